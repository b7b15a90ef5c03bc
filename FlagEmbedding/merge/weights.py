"""The arithmetic: a weighted mean of tensors, or a point of the arc between two, in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from FlagEmbedding.merge.arguments import Method

_PARALLEL = 1e-6  # sine below which an arc is a line


def combine(tensors: Sequence[Tensor], weights: Sequence[float], method: Method) -> Tensor:
    """``tensors`` of one shape by ``weights``, in float32 (float64 where one has it).

    linear: ``sum_i w_i x_i``. slerp (Shoemake 1985), two tensors as vectors with the angle θ between them:
    ``sin(w_0 θ) / sin θ · x_0 + sin(w_1 θ) / sin θ · x_1``; of parallel ones the linear mean. A weight of 0 takes no
    part, so the other model comes out to the bit.
    """
    precise = torch.float32
    for tensor in tensors:
        precise = torch.promote_types(precise, tensor.dtype)
    parts = [(tensor.to(precise), weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if method == "slerp" and len(parts) == 2:
        return _slerp(*parts[0], *parts[1])
    total = torch.zeros_like(parts[0][0]) if len(parts) > 1 else parts[0][0] * parts[0][1]
    for tensor, weight in parts if len(parts) > 1 else ():
        total += tensor * weight
    return total


def _slerp(one: Tensor, weight: float, other: Tensor, rest: float) -> Tensor:
    norms = one.double().norm() * other.double().norm()
    cosine = (one.double() * other.double()).sum() / norms.clamp_min(1e-300)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = float(torch.sin(angle))
    if sine < _PARALLEL or not float(norms):
        return one * weight + other * rest
    return one * (float(torch.sin(weight * angle)) / sine) + other * (float(torch.sin(rest * angle)) / sine)
