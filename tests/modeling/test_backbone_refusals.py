"""Checkpoints that do not fit what is asked of them: each is one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modeling.checkpoints import edit_config
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from FlagEmbedding.modeling.backbone import (
    load_backbone,
)
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.utils.errors import UsageError, UserError


def without(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[key]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def extra(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors") | {key: torch.zeros(3)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MOE = "tiny_moe_dir"
DENSE = "tiny_model_dir"
REFUSED: list[tuple[str, str, Callable[[Path], None], MoEConfig | None, str]] = [
    ("contradicting place", MOE, lambda f: None, MoEConfig(moe="output", num_experts=2),
     "--moe output with 2 experts, 1 per token, contradicts .* 2 experts in intermediate"),
    ("contradicting number", MOE, lambda f: None, MoEConfig(moe="intermediate", num_experts=4),
     "--moe intermediate with 4 experts, 1 per token, contradicts"),
    ("contradicting choice", MOE, lambda f: None, MoEConfig(moe="intermediate", num_experts=2, num_experts_per_tok=2),
     "contradicts"),
    ("experts, no fields", MOE, lambda f: edit_config(f, moe="REMOVE"), None,
     "holds weights of 2 experts in intermediate, but its config.json does not say so"),
    ("fields, no experts", DENSE, lambda f: edit_config(f, moe="output", num_experts=2, num_experts_per_tok=1), None,
     "says 2 experts in output, but the folder holds weights of dense layers"),
    ("other number", MOE, lambda f: edit_config(f, num_experts=3), None, "says 3 experts .* weights of 2 experts"),
    ("other place", MOE, lambda f: edit_config(f, moe="output"), None, "in output, but .* experts in intermediate"),
    ("number missing", MOE, lambda f: edit_config(f, num_experts="REMOVE"), None, "lacks num_experts$"),
    ("foo in the config", DENSE, lambda f: edit_config(f, moe="foo", num_experts=1, num_experts_per_tok=1), None,
     "config.json: moe must be intermediate, output or left out, got 'foo'"),
    ("weight missing", DENSE, lambda f: without(f, "encoder.layer.1.output.dense.weight"), None,
     "lacks encoder.layer.1.output.dense.weight"),
    ("gate missing", MOE, lambda f: without(f, "encoder.layer.1.intermediate.dense.gate.weight"), None,
     "lacks encoder.layer.1.intermediate.dense.gate.weight"),
    ("weight left over", DENSE, lambda f: extra(f, "encoder.layer.2.output.dense.bias"), None,
     "beyond what config.json describes, encoder.layer.2.output.dense.bias"),
    ("other width", DENSE, lambda f: edit_config(f, intermediate_size=64), None, "weights do not fit config.json"),
    ("no weights", DENSE, lambda f: (f / "model.safetensors").unlink(), None, "holds no weights"),
    ("broken weights", DENSE, lambda f: (f / "model.safetensors").write_bytes(b"PK\x00broken"), None, "cannot be read"),
    ("no config", DENSE, lambda f: (f / "config.json").unlink(), None, "is no checkpoint: it holds no config.json"),
    ("unknown type", DENSE, lambda f: edit_config(f, model_type="foo"), None, "nothing that transformers knows"),
    ("not json", DENSE, lambda f: (f / "config.json").write_text("{"), None, "nothing that transformers knows"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "damage", "asked", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_in_one_line(
    base: str, damage: Callable[[Path], None], asked: MoEConfig | None, message: str,
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(base), folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(folder, moe=asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such-model-here", "/no/such/folder", "a b", "x" * 200])
def test_unknown_name_is_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"neither a checkpoint folder nor a hub id|the hub did not give") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_encoder_of_another_structure_is_refused(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)).save_pretrained(
        tmp_path
    )
    assert isinstance(load_backbone(tmp_path), PreTrainedModel)
    with pytest.raises(UsageError, match=r"--moe output needs an encoder with encoder.layer.\*.output.dense"):
        load_backbone(tmp_path, moe=MoEConfig(moe="output", num_experts=2))
