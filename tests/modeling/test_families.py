"""Every encoder class of the installed transformers: the vectors of its own forward, or one clear line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY, write_tiny
from transformers import Qwen3Config, Qwen3Model

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder
from FlagEmbedding.modeling.families import PACKED, try_out
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError


def script() -> ModuleType:
    """``benchmarks/families.py``, which prints the same as a table."""
    spec = importlib.util.spec_from_file_location("families_table", REPOSITORY / "benchmarks" / "families.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = script()


@pytest.fixture(scope="module")
def outcomes() -> dict:
    return {found.name: found for found in table.outcomes(table.encoder_types())}


def test_every_encoder_gives_its_own_vectors_or_one_line(outcomes: dict) -> None:
    wrong = [
        found
        for found in outcomes.values()
        if (found.way == "refused" and ("\n" in found.note or not found.note))
        or (found.way not in ("refused", "not built") and not found.cosine > 0.99999)
    ]
    assert not wrong
    ways = [found.way for found in outcomes.values()]
    assert ways.count("packed") >= len(PACKED)
    assert ways.count("padded") > 20
    assert ways.count("not built") < 0.1 * len(ways)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("bert", "packed"),
        ("xlm-roberta", "packed"),
        ("electra", "packed"),
        ("ernie", "packed"),
        ("ernie, task ids", "padded"),
        ("electra, narrow embeddings", "padded"),
        ("rembert", "padded"),
        ("longformer", "padded"),
        ("ibert", "padded"),
        ("t5", "padded"),
        ("roc_bert", "padded"),
        ("qwen3", "padded"),
        ("mobilebert", "equal lengths"),
        ("convbert", "equal lengths"),
        ("fnet", "equal lengths"),
        ("canine", "refused"),
        ("bros", "refused"),
        ("vit", "refused"),
    ],
)
def test_what_becomes_of_it(name: str, way: str, outcomes: dict) -> None:
    assert outcomes[name].way == way, outcomes[name]


def test_the_classes_of_the_list_exist_and_are_tried(outcomes: dict) -> None:
    assert {found.encoder for found in outcomes.values() if found.way == "packed"} == PACKED


def qwen(folder: Path) -> Path:
    """A tiny causal encoder without a tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = Qwen3Config(vocab_size=300, intermediate_size=48, head_dim=16, max_position_embeddings=60, **sizes)
    Qwen3Model(config).save_pretrained(folder)
    return folder


def test_a_causal_encoder_is_known_by_what_it_does(tmp_path: Path) -> None:
    backbone = load_backbone(qwen(tmp_path))
    with pytest.raises(UsageError, match=r"Qwen3Model is causal: its first token sees no other.* use last_token"):
        M3Encoder(backbone, pooling="cls")
    encoder = M3Encoder(backbone, pooling="last").eval()
    assert encoder.pooling == "last_token"
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    with torch.no_grad():
        (found,) = encoder.encode([TokenBatch.from_lists(rows)], [{"dense"}])
        for row, vector in zip(rows, found.dense, strict=True):
            own = backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            torch.testing.assert_close(vector, own / own.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_the_last_token_of_a_bidirectional_encoder(engine: str, tiny_model_dir: Path) -> None:
    backbone = load_backbone(tiny_model_dir)
    encoder = M3Encoder(backbone, pooling="last_token", normalize=False, engine=EngineConfig(engine)).eval()
    rows = [[0, 7, 8, 9, 2], [0, 11, 2], [0, 30, 31, 2]]
    with torch.no_grad():
        (found,) = encoder.encode([TokenBatch.from_lists(rows)], [{"dense"}])
        for row, vector in zip(rows, found.dense, strict=True):
            own = backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            torch.testing.assert_close(vector, own, rtol=0, atol=1e-5)


def test_trying_out_leaves_no_trace(tiny_dropout_dir: Path) -> None:
    backbone = load_backbone(tiny_dropout_dir).train()
    state = torch.random.get_rng_state()
    assert try_out(backbone).way == "packed"
    assert backbone.training
    assert backbone.embeddings.dropout.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("experts", [None, MoEConfig(moe="output", num_experts=3, num_experts_per_tok=2)])
def test_every_precision_and_experts_stay_packed(
    dtype: torch.dtype, experts: MoEConfig | None, tiny_model_dir: Path
) -> None:
    assert try_out(load_backbone(tiny_model_dir, moe=experts, dtype=dtype)).way == "packed"


def test_one_line_says_why_it_is_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.write_tiny("ernie, task ids", tmp_path)
    backbone = load_backbone(tmp_path)
    encoder = M3Encoder(backbone)
    assert encoder.engine.engine == "padded"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("ErnieModel runs on --engine padded, its own forward: with this configuration the packed")
    with pytest.raises(UsageError, match="--grad_cache needs the packed engine, which ErnieModel does not run on"):
        M3Encoder(backbone, engine=EngineConfig(grad_cache=True))
    caplog.clear()
    M3Encoder(backbone, engine=EngineConfig("padded"))
    assert not caplog.records


def test_a_class_that_is_not_on_the_list_is_padded_though_it_agrees(tiny_bert_dir: Path) -> None:
    backbone = load_backbone(tiny_bert_dir)
    assert try_out(backbone).way == "packed"
    backbone.__class__ = type("LookalikeModel", (type(backbone),), {})
    assert try_out(backbone).way == "padded"


def test_broken_weights_are_one_line(tiny_bert_dir: Path) -> None:
    backbone = load_backbone(tiny_bert_dir)
    with torch.no_grad():
        backbone.encoder.layer[0].output.dense.bias[3] = float("nan")
    with pytest.raises(UsageError, match="BertModel gives states that are not finite"):
        M3Encoder(backbone)


@pytest.mark.parametrize(
    ("name", "longest"), [("roberta", 62), ("bert", 64), ("mpnet", 62), ("esm, absolute positions", 62), ("t5", None)]
)
def test_the_longest_input_is_known_by_structure(name: str, longest: int | None, tmp_path: Path) -> None:
    cls = table.write_tiny(name, tmp_path)
    backbone = load_backbone(tmp_path)
    assert type(backbone) is cls
    assert longest_input(backbone) == longest
    if longest is not None:
        ids = torch.full((1, longest), 20)
        assert backbone(input_ids=ids).last_hidden_state.shape[1] == longest
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=torch.full((1, longest + 1), 20))


def test_a_padding_id_of_zero_costs_one_place(tmp_path: Path) -> None:
    write_tiny(tmp_path, "xlmr", pad_token_id=0)
    backbone = load_backbone(tmp_path)
    assert longest_input(backbone) == 129
    assert backbone(input_ids=torch.full((1, 129), 20)).last_hidden_state.shape[1] == 129
