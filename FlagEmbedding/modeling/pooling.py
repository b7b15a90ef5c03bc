"""From token states to one vector a row: the first token, or the mean over real tokens.

Shape legend: N rows, L padded length, T real tokens in all, D dimensions.
"""

from __future__ import annotations

from torch import Tensor

from FlagEmbedding.modeling.slabs import Layout
from FlagEmbedding.utils.errors import UsageError

METHODS = ("cls", "mean")


def check_method(method: str) -> str:
    """``method`` itself if it is known. Raises ``UsageError`` otherwise."""
    if method not in METHODS:
        raise UsageError(f"pooling must be cls or mean, got {method!r}")
    return method


def pool_padded(hidden: Tensor, mask: Tensor, method: str) -> Tensor:
    """``hidden`` ``[N, L, D]`` with ``mask`` ``[N, L]`` (1 at real tokens, right-padded) to ``[N, D]``."""
    if check_method(method) == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def pool_packed(states: Tensor, layout: Layout, method: str) -> Tensor:
    """``states`` ``[T, D]``, sequences end to end as ``layout`` says, to ``[N, D]``."""
    if check_method(method) == "cls":
        return states.index_select(0, layout.starts)
    sums = states.new_zeros(len(layout.lengths), states.shape[1]).index_add(0, layout.row_of_token, states)
    return sums / layout.sizes.unsqueeze(-1).to(states.dtype)
