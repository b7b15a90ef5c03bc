"""From token states to one vector per sequence: the first token, the mean over real tokens, or the last one.

Shape legend: N sequences, L padded length, T real tokens in all, D dimensions.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from FlagEmbedding.modeling.options import POOLING_SPELLINGS, Pooling
from FlagEmbedding.modeling.slabs import Layout
from FlagEmbedding.utils.errors import UsageError

METHODS: tuple[str, ...] = get_args(Pooling)


def check_method(method: str) -> str:
    """``method`` by the name it has here. Raises ``UsageError`` if it is unknown."""
    method = POOLING_SPELLINGS.get(method, method)
    if method not in METHODS:
        raise UsageError(f"pooling must be cls or mean, got {method!r}; last_token is for causal models")
    return method


def pool_padded(hidden: Tensor, mask: Tensor, method: str) -> Tensor:
    """``hidden`` ``[N, L, D]`` with ``mask`` ``[N, L]`` (1 at real tokens, right-padded) to ``[N, D]``."""
    if check_method(method) == "cls":
        return hidden[:, 0]
    if method == "last_token":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def pool_packed(states: Tensor, layout: Layout, method: str) -> Tensor:
    """``states`` ``[T, D]``, sequences end to end as ``layout`` says, to ``[N, D]``."""
    if check_method(method) == "cls":
        return states.index_select(0, layout.starts)
    if method == "last_token":
        return states.index_select(0, layout.starts + layout.sizes - 1)
    sums = states.new_zeros(len(layout.lengths), states.shape[1]).index_add(0, layout.row_of_token, states)
    return sums / layout.sizes.unsqueeze(-1).to(states.dtype)
