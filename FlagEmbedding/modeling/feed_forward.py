"""The feed-forward block of a layer over rows without padding, dense or with experts at a dense layer's price.

With one expert a token, tokens are sorted by expert once a layer. Where the first linear holds the experts, tokens
stay sorted through the activation and the output projection, so that only narrow rows ``[T, D]`` are moved:

- slices: each expert is a plain product over its own slice of the tokens. Used on a CPU and in fp32.
- grouped: one grouped product for all experts (``torch.nn.functional.grouped_mm``), which reads the sizes of the groups
  on the device, so that nothing waits for them. Used on a GPU in half precision.

The permutation's backward is a permutation too (no atomic additions). More than one expert a token goes through the
layer's own ``mix``.

Shape legend: T tokens, E experts, D and I the narrow and the wide width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FlagEmbedding.modeling.linear import apply_linear, compute_dtype, is_plain, linear_add, linear_gelu
from FlagEmbedding.modeling.moe import MoELinear, Routing
from FlagEmbedding.modeling.pointwise import activate, add_norm

BLOCK = 32  # rows of the smallest block that an expert's tokens are cut into on a CPU


class _Permute(torch.autograd.Function):
    """Rows of ``x`` in another order; ``back`` is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _, back = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


class Assignment:
    """Which token goes to which expert, one expert a token.

    Args:
        routing: the router's decision, K = 1.
        experts: E.

    Attributes:
        order: ``[T]``, tokens sorted by expert; tokens of one expert keep their order.
        back: ``[T]``, the inverse.
        chosen: ``[T]``, the expert of each token in the new order.
    """

    def __init__(self, routing: Routing, experts: int) -> None:
        chosen = routing.experts.reshape(-1)
        self.experts = experts
        self.chosen, self.order = torch.sort(chosen, stable=True)
        positions = torch.arange(len(chosen), device=chosen.device)
        self.back = torch.empty_like(self.order).scatter_(0, self.order, positions)
        weights = routing.weights
        self.weights = weights.index_select(0, self.order) if weights.requires_grad else None

    def group(self, x: Tensor) -> Tensor:
        """Rows ``[T, ...]`` sorted by expert."""
        return _Permute.apply(x, self.order, self.back)

    def restore(self, x: Tensor) -> Tensor:
        """Rows sorted by expert, put back."""
        return _Permute.apply(x, self.back, self.order)

    def counts(self) -> list[int]:
        """Tokens of each expert; waits for the device."""
        return torch.bincount(self.chosen, minlength=self.experts).tolist()

    def ends(self) -> Tensor:
        """``[E]`` int32, where each expert's tokens end; stays on the device."""
        numbers = torch.arange(self.experts, device=self.chosen.device)
        return torch.searchsorted(self.chosen, numbers, right=True).to(torch.int32)


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """Intermediate and output block of one encoder layer, ``[T, D]`` to ``[T, D]``."""
    wide, narrow = layer.intermediate.dense, layer.output.dense
    activation = layer.intermediate.intermediate_act_fn
    if _sorts(wide):
        routing = wide.route(x)
        assignment = Assignment(routing, len(wide.experts))
        grouped = assignment.group(x)
        if use_grouped_product(grouped):
            y = apply_linear(narrow, activate(activation, grouped_product(wide, grouped, assignment)))
        elif _drops_nothing(layer.output):
            # The residual of these tokens is what the experts read, in the same order.
            y = _by_slices(wide, grouped, assignment, activation, narrow, residual=True)
            return layer.output.LayerNorm(wide.with_gate(assignment.restore(y), routing))
        else:
            y = _by_slices(wide, grouped, assignment, activation, narrow)
        y = wide.with_gate(assignment.restore(y), routing)
        return residual_block(layer.output, None, x, projected=y)
    if _sorts(narrow):
        states = linear_gelu(wide, activation, x)
        routing = narrow.route(states)
        assignment = Assignment(routing, len(narrow.experts))
        grouped = assignment.group(states)
        if use_grouped_product(grouped):
            y = grouped_product(narrow, grouped, assignment)
        else:
            y = _by_slices(narrow, grouped, assignment, None, None)
        y = narrow.with_gate(assignment.restore(y), routing)
        return residual_block(layer.output, None, x, projected=y)
    return residual_block(layer.output, linear_gelu(wide, activation, x), x)


def residual_block(block: Any, x: Tensor | None, residual: Tensor, *, projected: Tensor | None = None) -> Tensor:
    """``LayerNorm(dropout(dense(x)) + residual)``; ``projected`` stands for ``dense(x)`` where that is computed."""
    if projected is None:
        assert x is not None
        if _drops_nothing(block):
            return block.LayerNorm(linear_add(block.dense, x, residual))
        projected = apply_linear(block.dense, x)
    return add_norm(projected, residual, block.LayerNorm, block.dropout.p if block.training else 0.0)


def _drops_nothing(block: Any) -> bool:
    return not block.training or block.dropout.p == 0


def _sorts(module: nn.Module) -> bool:
    """True for experts whose tokens can be sorted: one expert a token, at least two experts, none of them hooked."""
    if not isinstance(module, MoELinear) or module.num_experts_per_tok != 1 or len(module.experts) < 2:
        return False
    return all(map(is_plain, module.experts)) and not (module._forward_hooks or module._forward_pre_hooks)


def _by_slices(
    layer: MoELinear,
    x: Tensor,
    assignment: Assignment,
    activation: Callable[[Tensor], Tensor] | None,
    narrow: Any,
    residual: bool = False,
) -> Tensor:
    """Every expert over its own slice, through activation and output projection where there are any.

    With ``residual``, ``x`` itself is added to what comes out.
    """
    counts = assignment.counts()
    in_blocks = _compiles(x)
    blocks = [_blocks(count) if in_blocks else [count] for count in counts]
    experts = [expert for expert, sizes in zip(layer.experts, blocks, strict=True) for _ in sizes]
    sizes = [size for each in blocks for size in each]
    pieces = x.split(sizes)
    weights = [None] * len(sizes) if assignment.weights is None else assignment.weights.split(sizes)
    results = []
    for expert, piece, weight in zip(experts, pieces, weights, strict=True):
        rows = len(piece)
        if in_blocks and 0 < rows < BLOCK:
            piece = F.pad(piece, (0, 0, 0, BLOCK - rows))
            weight = None if weight is None else F.pad(weight, (0, 0, 0, BLOCK - rows))
        # An expert without tokens runs on zero rows: its parameters take part in the backward, as DDP expects.
        if weight is None and activation is not None:
            y = linear_gelu(expert, activation, piece)
        else:
            y = apply_linear(expert, piece)
            y = y if weight is None else y * weight.to(y.dtype)
            y = y if activation is None else activate(activation, y)
        if narrow is not None:
            y = linear_add(narrow, y, piece) if residual else apply_linear(narrow, y)
        results.append(y[:rows])
    return torch.cat(results)


def _compiles(x: Tensor) -> bool:
    """Whether code for a new number of rows takes longer to compile than blocks cost.

    In fp32 with gradients it does not: there the weight's gradients of all blocks would have to be added up.
    """
    return x.device.type == "cpu" and (compute_dtype(x) != torch.float32 or not torch.is_grad_enabled())


def _blocks(count: int) -> list[int]:
    """``count`` rows as blocks of 32 times a power of two, largest first, and what remains.

    Experts get other numbers of tokens in every layer and slab, and oneDNN compiles code for each number of rows it
    meets: in bf16 that takes longer than the product. Products of a few sizes find their code compiled.
    """
    whole, rest = divmod(count, BLOCK)
    sizes = [BLOCK << bit for bit in reversed(range(whole.bit_length())) if whole >> bit & 1]
    return [*sizes, rest] if rest or not sizes else sizes


def use_grouped_product(x: Tensor) -> bool:
    """Whether experts go through one grouped product: half precision on a GPU."""
    return x.device.type == "cuda" and compute_dtype(x) in (torch.bfloat16, torch.float16)


def grouped_product(layer: MoELinear, x: Tensor, assignment: Assignment) -> Tensor:
    """``[T, in]`` sorted by expert to ``[T, out]``, without waiting for the device."""
    dtype = compute_dtype(x)
    experts: list[Any] = list(layer.experts)
    weight = torch.stack([expert.weight for expert in experts]).to(dtype)  # [E, out, in]
    y = F.grouped_mm(x.to(dtype), weight.transpose(1, 2), offs=assignment.ends())
    if experts[0].bias is not None:
        bias = torch.stack([expert.bias for expert in experts]).to(y.dtype)  # [E, out]
        # As a product its gradient is a product too; indexing would add up with atomics.
        y = y + F.one_hot(assignment.chosen, assignment.experts).to(y.dtype) @ bias
    return y if assignment.weights is None else y * assignment.weights.to(y.dtype)
