"""Self-attention over rows without padding: which way to compute it.

- CPU: kernels of ours over rows of any lengths (``attention_rows.py``), else torch's operators over groups of rows of
  one length (``attention_groups.py``).
- GPU: variable-length kernels, ``flash_attn`` where it can be imported, else torch's own
  (``torch.nn.attention.varlen``; with dropout the ATen operator beneath it, which that module does not expose).
- Where there is no such kernel (fp32, GPUs before Ampere, odd head widths, Apple's and Intel's devices): groups of
  equal length through ``scaled_dot_product_attention``.

Shape legend: N rows, T tokens in all, H heads, d width of a head, D = H * d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.modeling.attention_groups import GroupedAttention
from FlagEmbedding.modeling.attention_rows import RowAttention, takes
from FlagEmbedding.modeling.slabs import Layout, row_view
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


def packed_attention(
    projections: Tensor, layout: Layout, heads: int, *, queries: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of every row with itself, scaled by ``d ** -0.5``.

    Args:
        projections: ``[T, 3 * D]``, queries, keys and values side by side; ``[T, 2 * D]``, keys and values, with
            ``queries``.
        layout: where the rows lie.
        heads: H.
        queries: ``[N, D]``, one query a row (its first token's); None: every token asks.
        dropout: chance that a probability is dropped; 0 in evaluation.

    Returns:
        ``[T, D]``, or ``[N, D]`` with ``queries``; dtype of ``projections``.
    """
    if projections.device.type != "cpu":
        width = projections.shape[-1] // (heads * (3 if queries is None else 2))
        kernel = varlen_kernel(projections.device, projections.dtype, width)
        _say_once(projections.device.type, projections.dtype, kernel)
        if kernel is None:
            return _fused_groups(projections, layout, heads, queries, dropout)
        return _varlen(kernel, projections, layout, heads, queries, dropout)
    way = RowAttention if takes(projections, heads, parts=3 if queries is None else 2) else GroupedAttention
    return way.apply(projections, queries, layout, heads, dropout)  # type: ignore[no-any-return, no-untyped-call]


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """The function of the ``flash_attn`` package, if it can really be imported (a build for another torch cannot)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError):
        return None
    return flash_attn_varlen_func  # type: ignore[no-any-return]


def varlen_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Which variable-length kernel takes heads of this width there: ``flash_attn``, ``torch``, or None.

    Both ask for half precision, an NVIDIA GPU of compute capability 8.0 or more (Ampere) and a head width that is a
    multiple of 8 up to 256.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or width % 8 or width > 256 or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return "torch" if _flash_attn() is None else "flash_attn"


@functools.cache
def _say_once(device: str, dtype: torch.dtype, kernel: str | None) -> None:
    way = f"variable-length kernel of {kernel}" if kernel else "scaled_dot_product_attention by groups of equal length"
    logger.info("attention on %s in %s: %s", device, str(dtype).removeprefix("torch."), way)


def _varlen(
    kernel: str, projections: Tensor, layout: Layout, heads: int, queries: Tensor | None, dropout: float
) -> Tensor:
    """One kernel for the whole slab, half precision on a GPU."""
    if queries is None:
        query, key, value = projections.view(len(projections), 3, heads, -1).unbind(1)  # [T, H, d]
        query_ends, most = layout.cumulative, layout.longest
    else:
        key, value = projections.view(len(projections), 2, heads, -1).unbind(1)
        query = queries.view(len(queries), heads, -1)
        query_ends, most = layout.row_numbers, 1
    flash = _flash_attn() if kernel == "flash_attn" else None
    if flash is not None:
        result = flash(query, key, value, query_ends, layout.cumulative, most, layout.longest, dropout_p=dropout)
    elif dropout == 0:
        from torch.nn.attention.varlen import varlen_attn

        result = varlen_attn(query, key, value, query_ends, layout.cumulative, most, layout.longest)  # type: ignore[assignment]
    else:
        result = torch.ops.aten._flash_attention_forward(
            query, key, value, query_ends, layout.cumulative, most, layout.longest, dropout, False, False
        )[0]
    return result.reshape(len(query), -1)


def _fused_groups(projections: Tensor, layout: Layout, heads: int, queries: Tensor | None, dropout: float) -> Tensor:
    """Groups of equal length through torch's fused attention; any device and dtype, gradients by autograd."""
    parts = 3 if queries is None else 2
    sizes = [group.count * group.length for group in layout.groups]
    # One split, not a slice a group: the gradient of a split is one concatenation.
    pieces = projections.split(sizes)  # type: ignore[no-untyped-call]
    asking = pieces if queries is None else queries.split([group.count for group in layout.groups])  # type: ignore[no-untyped-call]
    results = []
    for group, piece, asked in zip(layout.groups, pieces, asking, strict=True):
        key, value = (row_view(piece, 0, group.count, group.length, heads, i, parts) for i in (parts - 2, parts - 1))
        length = group.length if queries is None else 1
        query = row_view(asked, 0, group.count, length, heads, 0, parts if queries is None else 1)
        result = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        results.append(result.transpose(1, 2).reshape(group.count * length, -1))
    return torch.cat(results)
