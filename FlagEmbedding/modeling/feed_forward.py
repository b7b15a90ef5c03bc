"""The feed-forward block of a layer over rows without padding, dense or with experts at a dense layer's price.

With one expert a token, tokens are sorted by expert once a layer. Where the first linear holds the experts, tokens
stay sorted through the activation and the output projection, so that only narrow rows ``[T, D]`` are moved:

- slices: each expert is a plain product over its own slice of the tokens. Used on a CPU.
- grouped: one grouped product for all experts (``torch.nn.functional.grouped_mm``), which reads the sizes of the groups
  on the device, so that nothing waits for them. Used in bfloat16 where the GPU has that kernel.
- blocks: one batched product (``modeling.expert_blocks``), which waits for nothing either. Used on every other device.

The permutation's backward is a permutation too (no atomic additions). More than one expert a token goes through the
layer's own ``mix``.

Shape legend: T tokens, P rows (tokens and fillers), E experts, D and I the narrow and the wide width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FlagEmbedding.modeling.expert_blocks import Blocks, stacked
from FlagEmbedding.modeling.linear import apply_linear, compute_dtype, is_plain, linear_add, linear_gelu
from FlagEmbedding.modeling.moe import MoELinear, Routing, weigh
from FlagEmbedding.modeling.pointwise import activate, add_norm
from FlagEmbedding.modeling.slabs import FILL

FILL_HALF = 128  # in bfloat16 experts get a multiple of this, in float32 of slabs.FILL


class _Permute(torch.autograd.Function):
    """Rows of ``x`` in another order; ``back`` is the inverse permutation.

    ``fillers`` are slices of the rows of ``x`` that ``order`` leaves out: their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, fillers: list[slice]) -> Tensor:
        ctx.save_for_backward(back)
        ctx.fillers = fillers
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        d_x = gradient.index_select(0, back)
        for rows in ctx.fillers:
            d_x[rows] = 0
        return d_x, None, None, None


class Assignment:
    """Which token goes to which expert, one expert a token.

    Args:
        routing: the router's decision, K = 1.
        experts: E.
        fill: fill each expert's rows up to a multiple of this, with copies of the first token whose results nobody
            reads. More than 1 reads the counts, so it waits for the device.

    Attributes:
        order: ``[P]``, the token in each row: sorted by expert, those of one expert in their order, then fillers.
        back: ``[T]``, the row of each token.
        chosen: ``[T]``, the expert of each sorted token, without fillers.
    """

    def __init__(self, routing: Routing, experts: int, fill: int = 1) -> None:
        chosen = routing.experts.reshape(-1)
        self.experts = experts
        self.chosen, self.order = torch.sort(chosen, stable=True)
        self._fillers: list[slice] = []
        self._rows: list[int] | None = None
        rows = torch.arange(len(chosen), device=chosen.device)
        real = self.order
        if fill > 1:
            rows = self._fill(fill, rows)
        self.back = torch.empty_like(real).scatter_(0, real, rows)
        weights = routing.weights
        self.weights = weights.index_select(0, self.order) if weights.requires_grad else None

    def _fill(self, fill: int, rows: Tensor) -> Tensor:
        """Put fillers into ``order``; gives the rows of the sorted tokens, ``[T]``."""
        counts = self.counts()
        self._rows = [count + -count % fill for count in counts]
        pieces, places, begin = [], [], 0
        for piece, count, whole in zip(self.order.split(counts), counts, self._rows, strict=True):  # type: ignore[no-untyped-call]
            pieces += [piece, piece.new_zeros(whole - count)]
            places.append(rows[:count] + begin)
            if whole > count:
                self._fillers.append(slice(begin + count, begin + whole))
            begin += whole
        self.order = torch.cat(pieces)
        return torch.cat(places)

    def group(self, x: Tensor) -> Tensor:
        """Rows ``[T, ...]`` sorted by expert, ``[P, ...]``."""
        return _Permute.apply(x, self.order, self.back, [])  # type: ignore[no-any-return, no-untyped-call]

    def restore(self, x: Tensor) -> Tensor:
        """Rows sorted by expert, put back."""
        return _Permute.apply(x, self.back, self.order, self._fillers)  # type: ignore[no-any-return, no-untyped-call]

    def counts(self) -> list[int]:
        """Tokens of each expert; waits for the device."""
        return torch.bincount(self.chosen, minlength=self.experts).tolist()

    def rows(self) -> list[int]:
        """Rows of each expert, fillers included; waits for the device."""
        return self.counts() if self._rows is None else self._rows

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
        if x.device.type != "cpu":
            y, restore = _on_device(wide, x, routing)
            y = restore(apply_linear(narrow, activate(activation, y)))
            return residual_block(layer.output, None, x, projected=wide.with_gate(y, routing))
        assignment = Assignment(routing, len(wide.experts), _fill(x))
        grouped = assignment.group(x)
        if _drops_nothing(layer.output):
            # The residual of these tokens is what the experts read, in the same order.
            y = _by_slices(wide, grouped, assignment, activation, narrow, residual=True)
            return layer.output.LayerNorm(wide.with_gate(assignment.restore(y), routing))  # type: ignore[no-any-return]
        y = _by_slices(wide, grouped, assignment, activation, narrow)
        y = wide.with_gate(assignment.restore(y), routing)
        return residual_block(layer.output, None, x, projected=y)
    if _sorts(narrow):
        states = linear_gelu(wide, activation, x)
        routing = narrow.route(states)
        if x.device.type != "cpu":
            y, restore = _on_device(narrow, states, routing)
        else:
            assignment = Assignment(routing, len(narrow.experts), _fill(states))
            y = _by_slices(narrow, assignment.group(states), assignment, None, None)
            restore = assignment.restore
        return residual_block(layer.output, None, x, projected=narrow.with_gate(restore(y), routing))
    return residual_block(layer.output, linear_gelu(wide, activation, x), x)


def residual_block(block: Any, x: Tensor | None, residual: Tensor, *, projected: Tensor | None = None) -> Tensor:
    """``LayerNorm(dropout(dense(x)) + residual)``; ``projected`` stands for ``dense(x)`` where that is computed."""
    if projected is None:
        assert x is not None
        if _drops_nothing(block):
            return block.LayerNorm(linear_add(block.dense, x, residual))  # type: ignore[no-any-return]
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
    rows = assignment.rows()
    weights = [None] * len(rows) if assignment.weights is None else assignment.weights.split(rows)  # type: ignore[no-untyped-call]
    results = []
    for expert, piece, weight in zip(layer.experts, x.split(rows), weights, strict=True):  # type: ignore[no-untyped-call]
        # An expert without tokens runs on zero rows: its parameters take part in the backward, as DDP expects.
        if weight is None and activation is not None:
            y = linear_gelu(expert, activation, piece)
        else:
            y = weigh(apply_linear(expert, piece), weight)
            y = y if activation is None else activate(activation, y)
        if narrow is not None:
            y = linear_add(narrow, y, piece) if residual else apply_linear(narrow, y)
        results.append(y)
    return torch.cat(results)


def _fill(x: Tensor) -> int:
    """An expert's rows are filled up to a multiple of this.

    Experts get other numbers of tokens in every layer and slab, and oneDNN compiles code for each number of rows it
    meets: in bf16 that takes longer than the product. Products of a few sizes find their code compiled. In fp32
    compiling is cheap and rows are not: nothing is filled in training, nor for a few sequences (see
    ``slabs.fill_price``).
    """
    if x.device.type != "cpu":
        return 1
    if compute_dtype(x) != torch.float32:
        return FILL_HALF
    return 1 if torch.is_grad_enabled() or len(x) < 8 * FILL else FILL


def use_grouped_product(layer: MoELinear, x: Tensor) -> bool:
    """Whether experts go through one grouped product: bfloat16 on a GPU of compute capability 9 or 10.

    Elsewhere torch computes it expert by expert and waits for the device to say how many rows each has. It asks for
    rows of a multiple of 16 bytes, here and in what the experts give.
    """
    first: Any = layer.experts[0]
    if x.device.type != "cuda" or compute_dtype(x) != torch.bfloat16 or torch.version.hip:
        return False
    wide = x.shape[-1] % 8 == first.weight.shape[0] % 8 == 0
    return wide and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _on_device(layer: MoELinear, x: Tensor, routing: Routing) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Every row of ``x`` through its expert, sorted by expert; and what puts such rows back. Waits for nothing."""
    if use_grouped_product(layer, x):
        assignment = Assignment(routing, len(layer.experts))
        return grouped_product(layer, assignment.group(x), assignment), assignment.restore
    blocks = Blocks(routing.experts.reshape(-1), len(layer.experts))
    y = blocks.product(list(layer.experts), blocks.spread(x), compute_dtype(x))
    return weigh(y, blocks.spread(routing.weights) if routing.weights.requires_grad else None), blocks.collect


def grouped_product(layer: MoELinear, x: Tensor, assignment: Assignment) -> Tensor:
    """``[T, in]`` sorted by expert to ``[T, out]``, without waiting for the device."""
    dtype = compute_dtype(x)
    experts: list[Any] = list(layer.experts)
    weight = stacked([expert.weight for expert in experts], dtype)  # [E, out, in]
    y = F.grouped_mm(x.to(dtype), weight.transpose(1, 2), offs=assignment.ends())
    if experts[0].bias is not None:
        bias = stacked([expert.bias for expert in experts], y.dtype)  # [E, out]
        # As a product its gradient is a product too; indexing would add up with atomics.
        y = y + F.one_hot(assignment.chosen, assignment.experts).to(y.dtype) @ bias
    return weigh(y, assignment.weights)
