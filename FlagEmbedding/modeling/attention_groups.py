"""Attention on a CPU by torch's own operators: groups of rows of one length, each a dense batch without a mask.

For processors that the kernels of ``attention_rows.py`` do not run on. The whole slab is one autograd function, because
slicing and concatenating groups through autograd would cost a zero-filled gradient of the whole slab for every group.
Two ways to compute a group:

- flash: torch's fused kernel. Best in fp32 without dropout, and in bf16 where the processor has AMX.
- plain: products, softmax and dropout written out. The only way with dropout; in bf16 without AMX the fused kernel's
  products are slow. Works a few rows at a time, so that the probabilities stay in the cache.

Shape legend: N rows, T tokens in all, H heads, d width of a head, D = H * d; in a group B rows of L tokens, Q queries
a row (L, or 1 where only the first token of each row asks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from FlagEmbedding.modeling.dropout import MaskSource
from FlagEmbedding.modeling.slabs import Group, Layout, row_view
from FlagEmbedding.utils.hardware import cpu_has_amx

# Probabilities computed at a time by the plain way: 1 MB in fp32, what a core's second cache holds.
CHUNK_ELEMENTS = 1 << 18


def _fused_kernel_pays(dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel beats the plain way for this dtype on this processor (see the top of this file)."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_amx())


def _chunks(group: Group, heads: int, queries: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of the group, a few at a time."""
    step = max(1, CHUNK_ELEMENTS // (heads * queries * group.length))
    for start in range(0, group.count, step):
        yield start, min(start + step, group.count)


def _dense(view: Tensor) -> Tensor:
    """``[B, H, L, d]`` view to contiguous ``[B * H, L, d]``, in float32 at least.

    The products of attention are many, small and of ever new shapes. For half precision oneDNN would compile code for
    each shape, which takes longer than the product; float32 goes to a library that compiles nothing.
    """
    copy = torch.empty(view.shape, dtype=torch.promote_types(view.dtype, torch.float32))
    return copy.copy_(view).view(-1, *view.shape[2:])


def _product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """``factor * left @ right`` over a batch, ``[N, A, K]`` and ``[N, K, C]`` to ``[N, A, C]``, in one pass."""
    result = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(result, left, right, beta=0, alpha=factor, out=result)


class GroupedAttention(torch.autograd.Function):
    """Attention of a whole slab, group by group: (projections, queries, layout, heads, dropout) to the output."""

    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, queries: Tensor | None, layout: Layout, heads: int, dropout: float
    ) -> Tensor:
        parts = 3 if queries is None else 2
        width = projections.shape[1] // parts
        asking = projections if queries is None else queries
        ctx.layout, ctx.heads, ctx.parts, ctx.width = layout, heads, parts, width
        ctx.plain = dropout > 0 or not _fused_kernel_pays(projections.dtype)
        ctx.source = MaskSource(dropout) if dropout > 0 else None
        output = projections.new_empty(asking.shape[0], width)
        keep = any(ctx.needs_input_grad)
        saved: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for group in layout.groups:
                _forward_group(ctx, projections, asking, group, output, saved if keep else None)
        ctx.scale = ctx.source.scale if ctx.source else 1.0
        ctx.source = None
        if keep:
            ctx.save_for_backward(projections, queries, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        projections, queries, *saved = ctx.saved_tensors
        asking = projections if queries is None else queries
        d_projections = torch.empty_like(projections)
        d_queries = None if queries is None else torch.empty_like(queries)
        d_asking = d_projections if d_queries is None else d_queries
        gradient = gradient.contiguous()
        remaining = iter(saved)
        with torch.autocast("cpu", enabled=False):
            for group in ctx.layout.groups:
                _backward_group(ctx, (projections, asking), gradient, group, (d_projections, d_asking), remaining)
        return d_projections, d_queries, None, None, None


def _views(
    ctx: Any, projections: Tensor, asking: Tensor, group: Group, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value views ``[B, H, ., d]`` of some of a group's rows."""
    rows, first = stop - start, group.token + start * group.length
    key, value = (
        row_view(projections, first, rows, group.length, ctx.heads, part, ctx.parts)
        for part in (ctx.parts - 2, ctx.parts - 1)
    )
    if ctx.parts == 3:
        return row_view(asking, first, rows, group.length, ctx.heads, 0, 3), key, value
    return row_view(asking, group.row + start, rows, 1, ctx.heads, 0, 1), key, value


def _output_view(ctx: Any, output: Tensor, group: Group, start: int, stop: int) -> Tensor:
    """``[B, H, Q, d]`` view of some of a group's rows of ``[T, D]`` (or ``[N, D]``)."""
    if ctx.parts == 3:
        return row_view(output, group.token + start * group.length, stop - start, group.length, ctx.heads, 0, 1)
    return row_view(output, group.row + start, stop - start, 1, ctx.heads, 0, 1)


def _forward_group(
    ctx: Any, projections: Tensor, asking: Tensor, group: Group, output: Tensor, saved: list[Tensor] | None
) -> None:
    if not ctx.plain:
        query, key, value = _views(ctx, projections, asking, group, 0, group.count)
        result, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        _output_view(ctx, output, group, 0, group.count).copy_(result)
        if saved is not None:
            saved += [result, log_sum]
        return
    scale = (ctx.width // ctx.heads) ** -0.5
    for start, stop in _chunks(group, ctx.heads, group.length if ctx.parts == 3 else 1):
        query, key, value = _views(ctx, projections, asking, group, start, stop)
        source: MaskSource | None = ctx.source
        scores = _product(_dense(query), _dense(key).transpose(1, 2), scale)  # [B * H, Q, L]
        probabilities = torch.softmax(scores, dim=-1)
        if saved is not None:
            saved.append(probabilities)
        if source is not None:
            mask = source.draw(*probabilities.shape)
            probabilities = probabilities * mask
            if saved is not None:
                saved.append(mask)
        # The scale of the kept probabilities is cheaper on the result.
        result = torch.bmm(probabilities, _dense(value))
        view = _output_view(ctx, output, group, start, stop)
        torch.mul(result.view(view.shape), source.scale if source else 1.0, out=view)


def _backward_group(
    ctx: Any,
    inputs: tuple[Tensor, Tensor],
    gradient: Tensor,
    group: Group,
    gradients: tuple[Tensor, Tensor],
    saved: Iterator[Tensor],
) -> None:
    if not ctx.plain:
        query, key, value = _views(ctx, *inputs, group, 0, group.count)
        result, log_sum = next(saved), next(saved)
        d_result = _output_view(ctx, gradient, group, 0, group.count)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_result, query, key, value, result, log_sum, 0.0, False
        )
        for target, part in zip(_views(ctx, *gradients, group, 0, group.count), parts, strict=True):
            target.copy_(part)
        return
    scale = (ctx.width // ctx.heads) ** -0.5
    for start, stop in _chunks(group, ctx.heads, group.length if ctx.parts == 3 else 1):
        query, key, value = _views(ctx, *inputs, group, start, stop)
        probabilities = next(saved)
        mask = next(saved) if ctx.scale != 1.0 else None
        d_result = _dense(_output_view(ctx, gradient, group, start, stop))
        d_probabilities = _product(d_result, _dense(value).transpose(1, 2), ctx.scale)
        kept = probabilities
        if mask is not None:
            kept = probabilities * mask
            d_probabilities.mul_(mask)
        d_value = torch.bmm(kept.transpose(1, 2), d_result)
        d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
        d_query = torch.bmm(d_scores, _dense(key))
        d_key = torch.bmm(d_scores.transpose(1, 2), _dense(query))
        targets = _views(ctx, *gradients, group, start, stop)
        for target, part, factor in zip(targets, (d_query, d_key, d_value), (scale, scale, ctx.scale), strict=True):
            torch.mul(part.view(target.shape), factor, out=target)
