"""What stands between the matrix products of an encoder layer: GELU, and dropout with residual and LayerNorm.

On a CPU with our kernels (``kernels/pointwise.h``) each is one pass over its rows, forward and backward, and a
dropout's mask is drawn again in the backward instead of kept. Everywhere else torch's operators run.

Shape legend: T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from FlagEmbedding.modeling import kernels
from FlagEmbedding.modeling.dropout import dropout


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernels.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return kernels.gelu(x, gradient.contiguous())


def is_exact_gelu(activation: Any) -> bool:
    """``nn.GELU()`` and transformers' ``GELUActivation`` by the error function (its default)."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return getattr(activation, "act", None) is nn.functional.gelu


def activate(activation: Any, x: Tensor) -> Tensor:
    """``activation(x)``."""
    if x.numel() and is_exact_gelu(activation) and kernels.available(x):
        return _Gelu.apply(x.contiguous())  # type: ignore[no-any-return, no-untyped-call]
    return activation(x)  # type: ignore[no-any-return]


class _AddNorm(torch.autograd.Function):
    """LayerNorm(dropout(y) + residual): (y, residual, weight, bias, epsilon, probability) to ``[T, D]``."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float, probability: float
    ) -> Tensor:
        y, residual = y.contiguous(), residual.contiguous()
        keep = any(ctx.needs_input_grad)
        out = torch.empty_like(residual)
        sums = torch.empty_like(residual) if keep else None
        means, inverses = torch.empty(2, len(y), dtype=torch.float32).unbind(0) if keep else (None, None)
        ctx.threshold, ctx.scale = kernels.dropout_threshold(probability)
        ctx.seed = int(torch.randint(2**62, (), dtype=torch.int64)) if ctx.threshold else 0
        ctx.y_dtype = y.dtype
        call = _call(ctx, weight, sums, means, inverses)
        call.y, call.residual, call.bias, call.out = (each.data_ptr() for each in (y, residual, bias, out))
        call.epsilon = epsilon
        kernels.add_norm_forward(y.dtype, residual.dtype, call, len(y))
        if keep:
            ctx.save_for_backward(sums, means, inverses, weight)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        sums, means, inverses, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_y = torch.empty(sums.shape, dtype=ctx.y_dtype)
        same = ctx.threshold == 0 and ctx.y_dtype == sums.dtype
        d_residual = d_y if same else torch.empty_like(sums)
        call = _call(ctx, weight, sums, means, inverses)
        call.d_out, call.d_y = gradient.data_ptr(), d_y.data_ptr()
        call.d_residual = None if same else d_residual.data_ptr()
        d_weight, d_bias = kernels.add_norm_backward(ctx.y_dtype, sums.dtype, call, len(sums))
        return d_y, d_residual, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


def _call(
    ctx: Any, weight: Tensor, sums: Tensor | None, means: Tensor | None, inverses: Tensor | None
) -> kernels.AddNormCall:
    return kernels.AddNormCall(
        weight=weight.data_ptr(),
        sums=None if sums is None else sums.data_ptr(),
        means=None if means is None else means.data_ptr(),
        inverses=None if inverses is None else inverses.data_ptr(),
        width=weight.shape[0],
        dropout_scale=ctx.scale,
        dropout_threshold=ctx.threshold,
        seed=ctx.seed,
    )


def add_norm(y: Tensor, residual: Tensor, norm: nn.Module, probability: float) -> Tensor:
    """``norm(dropout(y) + residual)``, ``[T, D]``, with the chance ``probability`` of dropping (0: nothing is)."""
    if _takes(y, residual, norm):
        return _AddNorm.apply(y, residual, norm.weight, norm.bias, norm.eps, probability)  # type: ignore[no-any-return, no-untyped-call]
    return norm(dropout(y, probability, training=probability > 0) + residual)  # type: ignore[no-any-return]


def _takes(y: Tensor, residual: Tensor, norm: nn.Module) -> bool:
    """Whether the kernel can do it: a plain LayerNorm of whole vectors, dtypes that it knows."""
    if type(norm) is not nn.LayerNorm or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    weight, bias = norm.weight, norm.bias
    if weight is None or bias is None or not (kernels.available(y) and kernels.available(residual)):
        return False
    if not weight.dtype == bias.dtype == residual.dtype or y.dtype not in (residual.dtype, torch.bfloat16):
        return False
    return y.ndim == 2 and len(y) > 0 and norm.normalized_shape == y.shape[1:] and y.shape[1] % 16 == 0
