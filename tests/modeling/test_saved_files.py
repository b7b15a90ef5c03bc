"""What a saved checkpoint says of itself, and how it is written and read: order, limits, dtype, files beside it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.checkpoints import same_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from FlagEmbedding.modeling.backbone import insert_experts, load_backbone, moe_layers, save_checkpoint
from FlagEmbedding.modeling.files import weight_files
from FlagEmbedding.modeling.heads import load_heads
from FlagEmbedding.modeling.interchange import REMOTE_FILE
from FlagEmbedding.modeling.moe import MoEConfig, MoELinear
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import ExpertLinear
from FlagEmbedding.modeling.tokens import special_ids
from FlagEmbedding.utils.errors import DataError


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(("limit", "expected"), [(64, 64), (4096, 128), (None, 128)])
def test_the_longest_sequence_is_what_tokenizer_and_positions_allow(
    limit: int | None, expected: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    if limit is not None:
        tokenizer.model_max_length = limit
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path, tokenizer=None if limit is None else tokenizer)
    assert read(tmp_path / "sentence_bert_config.json")["max_seq_length"] == expected
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path, tokenizer=tokenizer, max_length=32)
    assert read(tmp_path / "sentence_bert_config.json")["max_seq_length"] == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_config_and_weights_have_one_dtype(dtype: torch.dtype, tiny_moe_dir: Path, tmp_path: Path) -> None:
    save_checkpoint(load_backbone(tiny_moe_dir, dtype=dtype), tmp_path)
    assert read(tmp_path / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}


def test_weights_are_in_place_before_the_config_that_describes_them(
    tiny_moe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        moved.append(str(Path(target).relative_to(tmp_path)))
        replace(source, target)

    model = load_backbone(tiny_moe_dir)
    monkeypatch.setattr(os, "replace", noted)
    save_checkpoint(model, tmp_path)
    into_place = [name for name in moved if not name.startswith(".saving-")]
    assert into_place[-1] == "config.json" and "1_Pooling/config.json" in into_place[:-1]


def test_saving_over_shards_removes_them(tiny_model_dir: Path, tiny_roberta_dir: Path, tmp_path: Path) -> None:
    load_backbone(tiny_model_dir).save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load_backbone(tiny_roberta_dir)
    save_checkpoint(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]
    assert same_weights(load_backbone(tmp_path), model)


def test_the_model_of_the_tokenizer_goes_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers 5 writes tokenizer.json alone; older readers look for the sentencepiece model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.vocab_file = str(tmp_path / "sentencepiece.bpe.model")
    Path(tokenizer.vocab_file).write_bytes(b"pieces")
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out/sentencepiece.bpe.model").read_bytes() == b"pieces"
    tokenizer.vocab_file = str(tmp_path / "gone.model")
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("only_train", ["intermediate", None])
def test_what_trained_is_noted_also_when_training_goes_on(
    only_train: Any, tiny_moe_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for source in (tiny_moe_dir, tiny_model_dir):
        settings = MoEConfig(moe="intermediate", num_experts=2, only_train=only_train)
        save_checkpoint(load_backbone(source, moe=settings), tmp_path)
        assert read(tmp_path / "config.json")["only_train"] == only_train
        # Loaded without a word about it, the note stays.
        save_checkpoint(load_backbone(tmp_path), tmp_path / "again")
        assert read(tmp_path / "again/config.json")["only_train"] == only_train


def test_a_bare_encoder_is_saved_with_heads_pooling_and_normalization(tiny_model_dir: Path, tmp_path: Path) -> None:
    heads = {"colbert": nn.Linear(32, 8), "sparse": nn.Linear(32, 1)}
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path, heads=heads, pooling="mean", normalize=False)
    colbert, sparse, found = load_heads(tmp_path, 32)
    assert found and torch.equal(colbert.weight, heads["colbert"].weight)
    assert torch.equal(sparse.bias, heads["sparse"].bias)
    pooling = read(tmp_path / "1_Pooling/config.json")
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == 32
    assert [each["path"] for each in read(tmp_path / "modules.json")] == ["", "1_Pooling"]


def test_every_layer_is_upcycled_from_its_own_matrix(tiny_model_dir: Path) -> None:
    for place in ("intermediate", "output"):
        dense = load_backbone(tiny_model_dir)
        own = [getattr(layer, place).dense for layer in dense.encoder.layer]
        insert_experts(dense, MoEConfig(moe=place, num_experts=3))
        for linear, layer in zip(own, moe_layers(dense), strict=True):
            assert all(torch.equal(expert.weight, linear.weight) for expert in layer.experts)
            assert all(torch.equal(expert.bias, linear.bias) for expert in layer.experts)


def test_the_gate_is_drawn_as_linear_layers_are(tiny_model_dir: Path) -> None:
    """Uniform within 1 / sqrt(H), by torch's seed, another in every layer; settings reach the layer."""
    gates = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        settings = MoEConfig(moe="output", num_experts=4, num_experts_per_tok=2, router_jitter=0.25)
        layers = moe_layers(load_backbone(tiny_model_dir, moe=settings))
        assert {(layer.num_experts_per_tok, layer.router_jitter, len(layer.experts)) for layer in layers} == {
            (2, 0.25, 4)
        }
        gates.append([layer.gate.weight for layer in layers])
    assert torch.equal(gates[0][0], gates[1][0]) and not torch.equal(gates[0][0], gates[2][0])
    assert not torch.equal(*gates[0])
    largest = float(torch.stack(gates[0]).abs().max())
    assert 0.9 * 48**-0.5 < largest <= 48**-0.5


def test_the_travelling_file_is_the_packages_own(tiny_moe_dir: Path) -> None:
    assert (tiny_moe_dir / REMOTE_FILE.name).read_bytes() == REMOTE_FILE.read_bytes()
    assert read(tiny_moe_dir / "config.json")["auto_map"] == {"AutoModel": "modeling_moe_encoder.MoEXLMRobertaModel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "per_token"), [(3, 1), (4, 2)])
def test_the_travelling_layer_computes_what_the_trained_one_does(
    dtype: torch.dtype, experts: int, per_token: int
) -> None:
    """To the bit, the router's float32 in a model of half precision included."""
    torch.manual_seed(3)
    trained = MoELinear(32, 24, True, experts, per_token).to(dtype).eval()
    travelling = ExpertLinear(32, 24, True, experts, per_token).to(dtype).eval()
    travelling.load_state_dict(trained.state_dict())
    x = torch.randn(500, 32).to(dtype)
    with torch.no_grad():
        ours, theirs = trained.route(x), travelling.route(x)
        assert theirs.logits.dtype == torch.float32
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(trained(x), travelling(x))


def test_ties_go_the_same_way_in_every_computation(tiny_model_dir: Path) -> None:
    torch.manual_seed(3)
    layer = MoELinear(32, 24, True, 4, 1).eval()
    with torch.no_grad():
        layer.gate.weight.copy_(layer.gate.weight[:1].expand(4, -1))  # every logit ties with every other
    x = torch.randn(64, 32)
    with torch.no_grad():
        together = layer.route(x).experts[:, 0]
        alone = torch.cat([layer.route(row[None]).experts[:, 0] for row in x])
    assert torch.equal(together, alone)


def test_loading_leaves_transformers_loud_and_the_memory_aligned(tiny_model_dir: Path) -> None:
    """The same weights give the same bits whichever file they come from, so they must not lie where its header ends."""
    hf_logging.set_verbosity_info()
    try:
        model = load_backbone(tiny_model_dir)
        assert hf_logging.get_verbosity() == hf_logging.INFO
        assert hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.set_verbosity_warning()
    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}
    for each in (model, load_backbone(tiny_model_dir, moe=MoEConfig(moe="output", num_experts=2))):
        assert not any(module.training for module in each.modules())


def test_a_revision_is_the_one_loaded(tiny_model_dir: Path, tiny_roberta_dir: Path, tmp_path: Path) -> None:
    """In the hub's own cache, offline."""
    repository = tmp_path / "models--org--tiny"
    for number, (name, source) in enumerate({"main": tiny_model_dir, "older": tiny_roberta_dir}.items()):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(str(number) * 40, "utf-8")
        (repository / "snapshots" / (str(number) * 40)).symlink_to(source)
    for revision, source in ((None, tiny_model_dir), ("older", tiny_roberta_dir)):
        loaded = load_backbone("org/tiny", cache_dir=str(tmp_path), revision=revision)
        assert type(loaded) is type(load_backbone(source)) and same_weights(loaded, load_backbone(source))


def test_safetensors_go_before_pickles(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert same_weights(load_backbone(tmp_path), load_backbone(tiny_model_dir))


class Touch:
    """Its pickle makes a file when it is read as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    ran = tmp_path / "ran"
    torch.save({"weight": Touch(ran)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be read as weights"):
        load_backbone(tmp_path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Touch(ran)))
    assert ran.exists()  # it would have


def test_special_tokens_are_those_that_mean_nothing_by_themselves(tiny_model_dir: Path, tiny_bert_dir: Path) -> None:
    """cls, eos, padding and unknown; the mask and, in BERT, the separator count as tokens (as upstream)."""
    for folder, names in (
        (tiny_model_dir, ["<s>", "<pad>", "</s>", "<unk>"]),
        (tiny_bert_dir, ["[PAD]", "[UNK]", "[CLS]"]),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert special_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(names))
