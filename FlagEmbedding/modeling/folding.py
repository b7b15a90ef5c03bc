"""Experts folded back into one linear a layer, so that the model is a plain encoder that every library serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from FlagEmbedding.modeling.backbone import MOE_FIELDS, ROUTER_FIELD, moe_layers
from FlagEmbedding.modeling.moe import MoELinear
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import CLASS_PREFIX, expert_places


def fold_experts(model: PreTrainedModel, shares: Sequence[Sequence[float]]) -> None:
    """Put the weighted mean of its experts in the place of each MoE layer, and make the model a dense one.

    Args:
        model: changed in place, its configuration and class too.
        shares: for each MoE layer, in the order of the encoder, one share for each expert; their sum is 1.
    """
    folded = [_mean_of_experts(layer, own) for layer, own in zip(moe_layers(model), shares, strict=True)]
    for place, linear in zip(expert_places(model, model.config.moe), folded, strict=True):
        place.dense = linear
    for name in (*MOE_FIELDS, ROUTER_FIELD):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.__class__ = getattr(transformers, type(model).__name__.removeprefix(CLASS_PREFIX))


def _mean_of_experts(layer: MoELinear, shares: Sequence[float]) -> nn.Linear:
    first = layer.experts[0]
    assert isinstance(first, nn.Linear) and len(shares) == len(layer.experts)
    folded = nn.Linear(
        first.in_features,
        first.out_features,
        first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    with torch.no_grad():
        for name, target in folded.named_parameters():
            target.copy_(_mean([expert.get_parameter(name) for expert in layer.experts], shares))
    return folded.train(layer.training)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum_e share_e x_e`` in float32 at least, as ``x_0 + sum_e share_e (x_e - x_0)``: exact where all are equal."""
    heaviest = max(range(len(shares)), key=shares.__getitem__)
    start = tensors[heaviest].to(torch.promote_types(tensors[0].dtype, torch.float32))
    total = start.clone()
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * (tensor.to(start.dtype) - start)
    return total
