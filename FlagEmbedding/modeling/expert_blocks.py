"""Experts on any device and in any dtype without waiting for it: rows sorted by expert, in blocks of one expert each.

How many rows an expert gets is known to the device alone. The number of blocks is bounded by what the host knows:
``S // B + E`` blocks of B rows hold S rows of E experts, whatever the counts, each expert's last block being filled up.
Which expert a block is of stays on the device too, and the products of all blocks are one batched product over copies
of their experts' weights. Exact: nothing is dropped, fillers are read by nobody and give no gradient.

Shape legend: S rows (a token for each of its experts), E experts, B rows of a block, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST, LARGEST = 128, 1024  # rows of a block


class _Move(torch.autograd.Function):
    """``x`` at ``there``; ``back`` says where each row of ``x`` went, so that the backward adds nothing up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


class _Collect(torch.autograd.Function):
    """The rows ``[S, ...]`` of slots out of blocks; what no slot is in gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, rows, gradient), None


class _Products(torch.autograd.Function):
    """``x[n] @ weight[expert[n]].T``, ``[N, B, out]`` from ``[N, B, in]`` and ``[E, out, in]`` of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, expert)
        return torch.bmm(x, weight.index_select(0, expert).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, expert = ctx.saved_tensors
        d_x = torch.bmm(gradient, weight.index_select(0, expert)) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            parts = torch.bmm(gradient.transpose(1, 2), x)  # [N, out, in]
            # A product adds up the blocks of an expert in the same order every time; index_add would use atomics.
            d_weight = (_one_hot(expert, len(weight), parts.dtype).T @ parts.flatten(1)).view_as(weight)
        return d_x, d_weight, None


class _Joined(torch.autograd.Function):
    """Tensors of one shape stacked in another dtype, each read once."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.dtypes = [part.dtype for part in parts]
        whole = torch.empty((len(parts), *parts[0].shape), dtype=dtype, device=parts[0].device)
        torch._foreach_copy_(list(whole.unbind()), list(parts))
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(part.to(dtype) for part, dtype in zip(gradient.unbind(), ctx.dtypes, strict=True))


def stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """``torch.stack(parts).to(dtype)`` without the copy in between."""
    if all(part.dtype == dtype for part in parts):
        return torch.stack(list(parts))
    return _Joined.apply(dtype, *parts)  # type: ignore[no-any-return, no-untyped-call]


def _one_hot(numbers: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return (numbers.unsqueeze(1) == torch.arange(count, device=numbers.device)).to(dtype)


class Blocks:
    """Which row is in which block.

    Args:
        chosen: ``[S]`` int64, the expert of each row, on any device.
        experts: E.
    """

    def __init__(self, chosen: Tensor, experts: int) -> None:
        # Few rows of filling against few copies of the weights: about 16 blocks.
        size = min(max(SMALLEST, 1 << (max(len(chosen) // 16, 1) - 1).bit_length()), LARGEST)
        self.count, self.size = len(chosen) // size + experts if len(chosen) else 0, size
        device = chosen.device
        sorted_, order = torch.sort(chosen, stable=True)
        ends = torch.searchsorted(sorted_, torch.arange(experts, device=device), right=True)
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        blocks = (ends - starts + size - 1) // size
        block_ends = blocks.cumsum(0)
        shift = (block_ends - blocks) * size - starts  # from the sorted place to the row, by expert
        rows = torch.arange(len(chosen), device=device) + shift.index_select(0, sorted_)
        self.rows = torch.empty_like(order).scatter_(0, order, rows)  # [S], the row of each slot
        # [N·B], the slot in each row; slot 0 in fillers.
        self.slots = torch.zeros(self.count * size, dtype=order.dtype, device=device).scatter_(0, rows, order)
        numbers = torch.arange(self.count, device=device)
        self.expert = torch.searchsorted(block_ends, numbers, right=True).clamp_max(experts - 1)  # [N]

    def spread(self, x: Tensor) -> Tensor:
        """``[S, ...]`` to rows of blocks, ``[N·B, ...]``."""
        return _Move.apply(x, self.slots, self.rows)  # type: ignore[no-any-return, no-untyped-call]

    def collect(self, x: Tensor) -> Tensor:
        """Rows of blocks back to ``[S, ...]``."""
        return _Collect.apply(x, self.rows)  # type: ignore[no-any-return, no-untyped-call]

    def product(self, experts: Sequence[Any], x: Tensor, dtype: torch.dtype) -> Tensor:
        """Each expert (an ``nn.Linear``) over its rows, ``[N·B, in]`` to ``[N·B, out]`` in ``dtype``."""
        weight = stacked([expert.weight for expert in experts], dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = _Products.apply(x.to(dtype).view(self.count, self.size, x.shape[-1]), weight, self.expert)  # type: ignore[no-untyped-call]
            if experts[0].bias is not None:
                bias = stacked([expert.bias for expert in experts], dtype)
                y = y + (_one_hot(self.expert, len(experts), dtype) @ bias).unsqueeze(1)
        return y.flatten(0, 1)  # type: ignore[no-any-return]


def through_blocks(experts: Sequence[nn.Linear], x: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """``[S, in]`` to ``[S, out]``, row s through expert ``chosen[s]``."""
    blocks = Blocks(chosen, len(experts))
    return blocks.collect(blocks.product(experts, blocks.spread(x), dtype))
