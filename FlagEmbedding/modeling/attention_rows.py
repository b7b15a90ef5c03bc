"""Attention on a CPU by kernels of ours: every row by itself, whatever its length (``kernels/attention.h``).

One call a slab, nothing copied, no probabilities kept: the backward computes them again, and draws the dropout's mask
again from its seed. A row's result depends on nothing but the row.

Shape legend: N rows, T tokens in all, H heads, d width of a head, D = H * d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from FlagEmbedding.modeling import kernels
from FlagEmbedding.modeling.slabs import Layout


def takes(projections: Tensor, heads: int, parts: int) -> bool:
    """Whether the kernels can work on ``[T, parts * D]``: compiled, a known dtype, heads of whole vectors."""
    return kernels.available(projections) and projections.shape[1] // parts // heads % 16 == 0


class RowAttention(torch.autograd.Function):
    """Attention of a whole slab, row by row: (projections, queries, layout, heads, dropout) to the output."""

    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, queries: Tensor | None, layout: Layout, heads: int, dropout: float
    ) -> Tensor:
        projections = projections.contiguous()
        queries = None if queries is None else queries.contiguous()
        asking = projections if queries is None else queries
        width = projections.shape[1] // (3 if queries is None else 2)
        output = projections.new_empty(asking.shape[0], width)
        keep = any(ctx.needs_input_grad)
        log_sums = torch.empty(asking.shape[0], heads, dtype=torch.float32) if keep else None
        ctx.layout, ctx.heads = layout, heads
        ctx.threshold, ctx.scale = kernels.dropout_threshold(dropout)
        ctx.seed = int(torch.randint(2**62, (), dtype=torch.int64)) if ctx.threshold else 0
        call = _call(ctx, projections, queries, output, log_sums)
        kernels.attention("forward", projections.dtype, call, layout.lengths)
        if keep:
            ctx.save_for_backward(projections, queries, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        projections, queries, output, log_sums = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_projections = torch.empty_like(projections)
        d_queries = None if queries is None else torch.empty_like(queries)
        call = _call(ctx, projections, queries, output, log_sums)
        call.gradient, call.gradient_stride = gradient.data_ptr(), gradient.shape[1]
        call.d_query, call.d_key, call.d_value = _parts(d_projections, d_queries)
        kernels.attention("backward", projections.dtype, call, ctx.layout.lengths)
        return d_projections, d_queries, None, None, None


def _parts(projections: Tensor, queries: Tensor | None) -> tuple[int, int, int]:
    """Where queries, keys and values begin."""
    parts = 3 if queries is None else 2
    start, step = projections.data_ptr(), projections.shape[1] // parts * projections.element_size()
    places = [start + part * step for part in range(parts)]
    query, key, value = places if queries is None else [queries.data_ptr(), *places]
    return query, key, value


def _call(
    ctx: Any, projections: Tensor, queries: Tensor | None, output: Tensor, log_sums: Tensor | None
) -> kernels.AttentionCall:
    query, key, value = _parts(projections, queries)
    width = output.shape[1] // ctx.heads
    layout: Layout = ctx.layout
    return kernels.AttentionCall(
        query=query,
        key=key,
        value=value,
        query_stride=(projections if queries is None else queries).shape[1],
        key_stride=projections.shape[1],
        query_starts=(layout.cumulative if queries is None else layout.row_numbers).data_ptr(),
        key_starts=layout.cumulative.data_ptr(),
        heads=ctx.heads,
        width=width,
        scale=width**-0.5,
        dropout_scale=ctx.scale,
        dropout_threshold=ctx.threshold,
        seed=ctx.seed,
        output=output.data_ptr(),
        output_stride=output.shape[1],
        log_sums=None if log_sums is None else log_sums.data_ptr(),
    )
