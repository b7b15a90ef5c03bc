"""How rows without padding are laid out: slabs of rows by token budget, and groups of rows of one length.

Linear layers see a slab as one matrix of tokens, so its size is chosen for the machine (1 to 2 thousand tokens stay in
a processor's cache, a GPU wants many more). Attention runs over groups of rows of exactly equal length, which need no
mask; rows sorted by length make such groups long.

Shape legend: N rows, T tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


def plan_slabs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into slabs, longest rows first.

    Args:
        lengths: tokens of each row.
        budget: most tokens in a slab (a longer row goes alone); 0 puts all rows into one slab.

    Returns:
        Row numbers of each slab, by descending length; equal lengths keep their order. No slab is empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    slabs: list[list[int]] = []
    used = 0
    for row in order:
        if not slabs or (budget > 0 and used + lengths[row] > budget):
            slabs.append([])
            used = 0
        slabs[-1].append(row)
        used += lengths[row]
    return slabs


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one length.

    Attributes:
        row, token: where the group begins, counted in rows and in tokens.
        count, length: how many rows, of how many tokens each.
    """

    row: int
    token: int
    count: int
    length: int


class Layout:
    """Where the rows of one slab lie.

    Args:
        lengths: tokens of each row, in the order of the rows; none may be 0.
        device: where the index tensors are made (once, without waiting for the device).

    Attributes:
        groups: neighbouring rows of one length, together all rows.
        longest: the greatest length.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.device = device
        self.groups: list[Group] = []
        row = token = 0
        for length, members in groupby(self.lengths):
            count = len(list(members))
            self.groups.append(Group(row, token, count, length))
            row, token = row + count, token + count * length
        self.tokens = token
        self.longest = max(self.lengths, default=0)

    @cached_property
    def cumulative(self) -> Tensor:
        """``[N + 1]`` int32: where each row begins, and T at the end (what variable-length kernels ask for)."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return torch.tensor(ends, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def row_numbers(self) -> Tensor:
        """``[N + 1]`` int32: 0, 1, … N; the layout of one query a row."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def starts(self) -> Tensor:
        """``[N]`` int64: the first token of each row."""
        return self.cumulative[:-1].long()

    @cached_property
    def row_of_token(self) -> Tensor:
        """``[T]`` int64: the row that each token belongs to."""
        rows = torch.repeat_interleave(torch.tensor(self.lengths))
        return rows.to(self.device, non_blocking=True)


def row_view(packed: Tensor, first: int, rows: int, length: int, heads: int, part: int, parts: int) -> Tensor:
    """``[B, H, L, d]`` view of one part (query, key or value) of B rows of L tokens, the first token ``first``.

    ``packed`` is ``[T, parts * H * d]``, the parts side by side.
    """
    block = packed[first : first + rows * length].view(rows, length, parts, heads, -1)
    return block[:, :, part].transpose(1, 2)
