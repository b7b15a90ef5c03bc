"""Linear layers through oneDNN on a CPU, with what follows them fused where nothing needs a gradient.

``F.linear`` in fp32 goes to MKL, which on a Zen 4 processor is 8 to 12 % slower than oneDNN at an encoder's shapes; in
bf16 torch's own path is 5 % slower than the same library called through its fused operator. That operator also adds a
bias for nothing, applies GELU in registers (35 % off the widest layer in bf16) and adds a residual. It is the one that
``torch.compile`` emits; it has no gradient of its own, so there is an autograd function around it. Everywhere else
(GPU, other dtypes, oneDNN missing or switched off) the plain operators run.

Weights that will not change can be laid out once as oneDNN's fp32 products read them (``prepack``): the same bits, and
on a Granite Rapids processor a sixth less time.

Shape legend: T tokens, K and M the widths in and out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FlagEmbedding.modeling.pointwise import activate, is_exact_gelu
from FlagEmbedding.utils.hardware import cpu_instruction_sets, onednn_takes_bf16

# oneDNN and torch's layer over it keep the code generated for each distinct number of rows: 1,024 of them, about 1 MB
# each. A training slab's row count is hardly ever met again, so that gigabyte buys nothing; where rows are filled up to
# round numbers, these many are enough. Both read this once, at first use.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

KEEPS = "_keeps_weights"  # a layer with this attribute set to False keeps no second copy of its weights
_DTYPES = (torch.float32, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with ``x`` is computed in: autocast's where it is on, else that of ``x``."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _fused(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused operator takes this product."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        return False
    return compute_dtype(x) in _DTYPES and x.numel() > 0 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``activation(x @ weight.T + bias)`` in the dtype of ``x``, which ``weight`` and ``bias`` have too."""
    if x.dtype == torch.bfloat16 and not onednn_takes_bf16():
        # Products of bfloat16 numbers, added up in float32 and rounded once, as oneDNN does; five times as fast here
        # as torch's own bfloat16 product.
        return _product(x.float(), weight.float(), None if bias is None else bias.float(), activation).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")  # type: ignore[no-any-return]


def _transposed(weight: Tensor) -> Tensor:
    """``weight.T``, copied where oneDNN reads the view slowly.

    AVX2, float32, a weight of more inputs than outputs: 23 GFLOP/s by the view, 34 by the copy, the same bits.
    """
    view = weight.t()
    slow = view.shape[0] > view.shape[1] and weight.dtype == torch.float32 and cpu_instruction_sets() == ("avx2",)
    return view.contiguous() if slow else view


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient.T @ x``, ``[M, K]`` from ``[T, M]`` and ``[T, K]`` of one dtype."""
    if x.dtype == torch.bfloat16 and not onednn_takes_bf16():
        return (gradient.float().t() @ x.float()).to(x.dtype)
    return gradient.t() @ x


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` computed in ``dtype``; gradients in the inputs' dtypes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight_dtype = weight.dtype
        return _product(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_x = d_weight = d_bias = None
        if weight is not None:
            d_x = _product(gradient, _transposed(weight.to(gradient.dtype)), None).to(ctx.x_dtype)
        if x is not None:
            d_weight = _weight_gradient(gradient, x).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            d_bias = gradient.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None


class Kept:
    """The weights of some linear layers side by side, in ``dtype``, and whether they are still the layers'."""

    def __init__(self, linears: tuple[nn.Linear, ...], dtype: torch.dtype) -> None:
        with torch.no_grad():
            biases: list[Tensor] = [each.bias for each in linears if each.bias is not None]
            self.weight = torch.cat([each.weight for each in linears]).to(dtype)
            self.bias = torch.cat(biases).to(dtype) if biases else None
        self._state = self._look(linears)

    @staticmethod
    def _look(linears: tuple[nn.Linear, ...]) -> list[tuple[int, int]]:
        tensors = [tensor for each in linears for tensor in (each.weight, each.bias) if tensor is not None]
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """In a copy or a pickle of the layer: None, since these are the weights of another."""
        return type(None), ()

    def fits(self, linears: tuple[nn.Linear, ...]) -> bool:
        """False once a weight or bias was changed or replaced."""
        return self._look(linears) == self._state


class Prepacked(Kept):
    """The same in float32, laid out for oneDNN's products of about ``rows`` tokens."""

    def __init__(self, linears: tuple[nn.Linear, ...], rows: int) -> None:
        super().__init__(linears, torch.float32)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)


def _frozen(linears: tuple[nn.Module, ...], x: Tensor) -> Kept | None:
    """Weights that nothing trains, as a product with ``x`` reads them: joined and cast once, not for every slab.

    Takes as much memory as they do in that precision. None where there is nothing to gain, in inference, and where
    FSDP has divided the weights (``KEEPS`` is False), which would undo it.
    """
    first: Any = linears[0]
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled() or not first.__dict__.get(KEEPS, True):
        return None
    if any(parameter.requires_grad for each in linears for parameter in each.parameters()):
        return None
    if len(linears) == 1 and first.weight.dtype == dtype:
        return None
    kept: dict[tuple[int, torch.dtype], Kept] = first.__dict__.setdefault("_kept", {})
    found = kept.get((len(linears), dtype))
    if found is None or not found.fits(linears):  # type: ignore[arg-type]
        found = kept[len(linears), dtype] = Kept(linears, dtype)  # type: ignore[arg-type]
    return found


def prepack(*linears: nn.Module, rows: int) -> None:
    """Keep the weights of these layers side by side in oneDNN's own layout, for products of about ``rows`` tokens.

    Does nothing where there is nothing to gain: other dtypes than float32, no oneDNN, layers with hooks. Takes as much
    memory as the weights again. Used without gradients only, and no longer once the layers change.
    """
    if not _joinable(linears) or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    weights = [each.weight for each in linears]
    if all(weight.dtype == torch.float32 and _fused(weight, weight) for weight in weights):  # type: ignore[arg-type]
        linears[0].__dict__.setdefault("_prepacked", {})[len(linears)] = Prepacked(linears, rows)  # type: ignore[arg-type]


def _prepacked(linears: tuple[nn.Module, ...], x: Tensor) -> Prepacked | None:
    if torch.is_grad_enabled() or compute_dtype(x) != torch.float32 or x.dtype != torch.float32:
        return None
    found: Prepacked | None = linears[0].__dict__.get("_prepacked", {}).get(len(linears))
    if found is None or not _fused(x, found.weight) or not found.fits(linears):  # type: ignore[arg-type]
        return None
    return found


def _joinable(linears: tuple[nn.Module, ...]) -> bool:
    """Plain linear layers, all of them with a bias or none."""
    return all(map(is_plain, linears)) and len({each.bias is None for each in linears}) == 1


def side_by_side(x: Tensor, *linears: nn.Module) -> Tensor:
    """The outputs of several linear layers side by side, as one product where they are plain linear layers."""
    if not _joinable(linears):
        return torch.cat([each(x) for each in linears], dim=-1)
    packed = _prepacked(linears, x)
    if packed is not None:
        return _product(x, packed.weight, packed.bias)
    if (kept := _frozen(linears, x)) is not None:
        return linear(x, kept.weight, kept.bias)
    weight = torch.cat([each.weight for each in linears])  # type: ignore[misc]
    biases = [each.bias for each in linears if each.bias is not None]
    return linear(x, weight, torch.cat(biases) if biases else None)  # type: ignore[arg-type]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for ``[T, K]``: the same value, dtype under autocast, and gradients."""
    if not _fused(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        dtype = compute_dtype(x)
        return _product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return _Linear.apply(x, weight, bias, compute_dtype(x))  # type: ignore[no-any-return, no-untyped-call]


def is_plain(module: nn.Module) -> bool:
    """True for an ``nn.Linear`` whose parameters may be used directly: no subclass, no hooks."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, by way of :func:`linear` where the module is a plain linear layer."""
    if not is_plain(module):
        return module(x)  # type: ignore[no-any-return]
    packed = _prepacked((module,), x)
    if packed is not None:
        return _product(x, packed.weight, packed.bias)
    if (kept := _frozen((module,), x)) is not None:
        return linear(x, kept.weight, kept.bias)
    return linear(x, module.weight, module.bias)  # type: ignore[arg-type]


def _can_fuse(module: nn.Module, x: Tensor) -> bool:
    return (
        is_plain(module)
        and _fused(x, module.weight)  # type: ignore[arg-type]
        and not torch.is_grad_enabled()
        and x.dtype == compute_dtype(x) == module.weight.dtype
        and (x.dtype != torch.bfloat16 or onednn_takes_bf16())
    )


def linear_gelu(module: nn.Module, activation: Any, x: Tensor) -> Tensor:
    """``activation(module(x))``; exact GELU is fused when no gradient is kept."""
    if _can_fuse(module, x) and is_exact_gelu(activation):
        packed = _prepacked((module,), x)
        return _product(x, packed.weight if packed else module.weight, module.bias, "gelu")  # type: ignore[arg-type]
    return activate(activation, apply_linear(module, x))


def linear_add(module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``module(x) + residual``; fused when no gradient is kept."""
    if _can_fuse(module, x) and residual.dtype == x.dtype:
        packed = _prepacked((module,), x)
        weight = packed.weight if packed else module.weight
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, module.bias, "add")  # type: ignore[no-any-return]
    return apply_linear(module, x) + residual
