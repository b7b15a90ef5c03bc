"""Every encoder class of the installed transformers: the vectors of its own forward, or one clear line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY, write_tiny
from modeling.checkpoints import edit_config
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3Model

from FlagEmbedding.modeling.backbone import load_backbone, load_trained_state, save_checkpoint, select_trainable
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder
from FlagEmbedding.modeling.families import PACKED, try_out
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import DataError, UsageError


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
    assert ways.count("not built") < 0.15 * len(ways)


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


def test_experts_in_an_encoder_without_a_pooler_come_back(tmp_path: Path) -> None:
    table.write_tiny("electra", tmp_path / "base")
    made = load_backbone(tmp_path / "base", moe=MoEConfig(moe="intermediate", num_experts=2))
    save_checkpoint(made, tmp_path / "experts")
    again = load_backbone(tmp_path / "experts")
    assert again.state_dict().keys() == made.state_dict().keys()
    assert try_out(again).way == "packed"


def test_a_weight_under_two_names_is_stored_once_and_comes_back(tmp_path: Path) -> None:
    table.write_tiny("t5", tmp_path / "base")
    encoder = M3Encoder(load_backbone(tmp_path / "base"), pooling="mean")
    save_checkpoint(encoder, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert "shared.weight" in stored
    assert "encoder.embed_tokens.weight" not in stored
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    load_trained_state(encoder, tmp_path / "saved")
    for model in (encoder.model, load_backbone(tmp_path / "saved")):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["layers", "encoder"])
def test_weights_of_more_layers_than_the_configuration_are_refused(kind: str, tmp_path: Path) -> None:
    """Whatever a family calls its layers."""
    table.write_tiny("qwen3" if kind == "layers" else "distilbert", tmp_path)
    assert load_backbone(tmp_path)
    edit_config(tmp_path, **{"num_hidden_layers" if kind == "layers" else "n_layers": 1, "layer_types": "REMOVE"})
    with pytest.raises(DataError, match=r"holds, beyond what config.json describes, (layers|transformer.layer).1"):
        load_backbone(tmp_path)


def test_a_pooler_is_neither_missed_nor_trained(tmp_path: Path) -> None:
    table.write_tiny("squeezebert", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    poolers = [name for name in state if name.startswith("pooler.")]
    assert poolers
    save_file(
        {name: value for name, value in state.items() if name not in poolers},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    backbone = load_backbone(tmp_path)
    select_trainable(backbone, None)
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(poolers)
