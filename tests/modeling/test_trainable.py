"""Which parameters train, and that recomputed layers above frozen ones have their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modeling.checkpoints import apart
from torch import nn

from FlagEmbedding.modeling.backbone import (
    load_backbone,
    select_trainable,
)
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize("experts", [0, 2])
def test_only_train(place: str, experts: int, tiny_model_dir: Path) -> None:
    moe = MoEConfig(moe=place, num_experts=experts) if experts else None
    backbone = load_backbone(tiny_model_dir, moe=moe)
    encoder = M3Encoder(backbone, nn.Linear(32, 32), nn.Linear(32, 1))
    select_trainable(encoder, place)
    kinds = [f"experts.{e}.{kind}" for e in range(experts) for kind in ("weight", "bias")] or ["weight", "bias"]
    kinds += ["gate.weight"] if experts else []
    expected = {f"model.encoder.layer.{i}.{place}.dense.{kind}" for i in range(2) for kind in kinds}
    expected |= {f"{head}_linear.{kind}" for head in ("colbert", "sparse") for kind in ("weight", "bias")}
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == expected
    bare = load_backbone(tiny_model_dir, moe=moe)
    select_trainable(bare, place)
    trained = {f"model.{name}" for name, parameter in bare.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in expected if name.startswith("model.")}


def test_frozen_encoder_and_positions(tiny_model_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), nn.Linear(32, 32), nn.Linear(32, 1))
    select_trainable(encoder, None, fix_position_embedding=True)
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embeddings.position_embeddings.weight"]
    select_trainable(encoder, None, fix_encoder=True)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert {name.split("_")[0] for name in trained} == {"colbert", "sparse"}
    select_trainable(encoder, None)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(UsageError, match="nothing would train"):
        select_trainable(M3Encoder(load_backbone(tiny_model_dir)), None, fix_encoder=True)


@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_recomputed_layers_give_the_same_gradients_above_frozen_ones(place: str, tiny_dropout_dir: Path) -> None:
    found = {}
    for recompute in (False, True):
        torch.manual_seed(4)
        settings = MoEConfig(moe=place, num_experts=2, router_gradient="straight_through", router_jitter=0.2)
        model = apart(load_backbone(tiny_dropout_dir, moe=settings)).train()
        select_trainable(model, place)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(6, 300, (3, 8), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(9)  # dropout and noise
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        output.square()[..., :3].sum().backward()
        found[recompute] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)
        assert "gate" not in name or float(gradient.abs().max()) > 0
