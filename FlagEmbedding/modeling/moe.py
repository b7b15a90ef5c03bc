"""Experts for training: the router's gradient, and a tape of what the routers decided.

The layer's forward is the published one and lives in ``remote_code/modeling_moe_encoder.py``, the file that travels
with a checkpoint; ``MoELinear`` adds what only training needs. None of it changes a bit of the output in evaluation.

Shape legend: T tokens, E experts, K experts chosen per token, H and I the widths in and out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from FlagEmbedding.modeling.expert_blocks import through_blocks
from FlagEmbedding.modeling.linear import compute_dtype, is_plain
from FlagEmbedding.modeling.options import MoEConfig
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import (
    CLASS_PREFIX,
    ExpertLinear,
    Routing,
    encoder_with_experts,
)

__all__ = ["ExpertLinear", "MoEConfig", "MoELinear", "Routing", "RoutingTape", "record_routing", "token_mask"]


class _PreciseLinear(torch.autograd.Function):
    """``x @ weight.T`` in float32 at least; the backward casts ``x`` again instead of keeping a second, wider copy.

    In half precision that copy would be twice the size of the layer's input, for E columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(precise), weight.to(precise))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            to_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            to_weight = (gradient.T @ x.to(gradient.dtype)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


class _ZeroGradient(torch.autograd.Function):
    """Identity whose backward also gives a parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = (parameter.shape, parameter.dtype, parameter.device)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


class _Weighted(torch.autograd.Function):
    """``y`` itself for weights of exactly 1; their gradient ``sum_i gradient · y``, added up in float32 at least."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.dtype = weights.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        precise = torch.promote_types(y.dtype, torch.float32)
        sums = []
        for start in range(0, max(len(y), 1), _ROWS):  # few wider copies at a time
            a, b = gradient[start : start + _ROWS], y[start : start + _ROWS]
            sums.append((a.to(precise) * b.to(precise)).sum(-1, keepdim=True))
        return gradient, torch.cat(sums).to(ctx.dtype)


_ROWS = 4096


def weigh(y: Tensor, weights: Tensor | None) -> Tensor:
    """The outputs ``y`` ``[T, I]`` of one expert a token by their weights ``[T, 1]``, which are exactly 1.

    In half precision what comes out of it for the router is the least exact of all gradients, and no wider arithmetic
    mends that. Per token it is a sum over I whose terms cancel to a third or less, since a LayerNorm behind takes out
    most of ``y``'s scale; and a gate's gradient is a sum over tokens of both signs. The rounding of activations to
    2⁻⁹, which a temperature of 0.02 makes 2 to 4 % of the gradient that arrives here, so becomes 6 to 8 % per token and
    up to 25 % in a gate that saw ten tokens; the same sums in float64 over the same rounded numbers are no nearer.
    Besides, a token near a tie may go to the other expert, which turns its sign: 0.2 % of the tokens, to whom a gate's
    gradient may owe a tenth. More tokens a step average the former out.
    """
    return y if weights is None else _Weighted.apply(y, weights)  # type: ignore[no-untyped-call]


class MoELinear(ExpertLinear):
    """The published layer, ready to train.

    With ``router_gradient`` ``none`` and K = 1 the router's gradient is exactly zero, as published: the gate still
    receives it (a tensor of zeros), so that weight decay and DDP treat it as they did there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        num_experts: int,
        num_experts_per_tok: int,
        router_gradient: str = "none",
        router_jitter: float = 0.0,
        router: str = "learned",
    ) -> None:
        super().__init__(in_features, out_features, bias, num_experts, num_experts_per_tok, router)
        self.router_gradient = router_gradient
        self.router_jitter = router_jitter
        self._recorders: list[Callable[[Routing, Tensor | None], None]] = []
        self._token_mask: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MoEConfig) -> MoELinear:
        """``config.num_experts`` deep copies of ``linear`` and a new gate (``nn.Linear``'s usual initialization)."""
        experts, per_token = config.num_experts, config.num_experts_per_tok
        with torch.device("meta"):  # every parameter is put in place below
            layer = cls(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                experts,
                per_token,
                config.router_gradient,
                config.router_jitter,
                config.router,
            )
        layer.experts = nn.ModuleList(copy.deepcopy(linear) for _ in range(experts))
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer.gate = nn.Linear(linear.in_features, experts, bias=False, **like)
        if config.router == "hash":
            nn.init.zeros_(layer.gate.weight)
        return layer.train(linear.training)

    def router_logits(self, x: Tensor) -> Tensor:
        if self.training and self.router_jitter > 0:
            precise = x.to(torch.promote_types(x.dtype, torch.float32))
            noise = torch.empty_like(precise).uniform_(1 - self.router_jitter, 1 + self.router_jitter)
            x = precise * noise
        return _PreciseLinear.apply(x, self.gate.weight)  # type: ignore[no-any-return, no-untyped-call]

    def route(self, x: Tensor) -> Routing:
        """The published choice and weights; the weights carry the router's gradient as configured."""
        routing = super().route(x)
        if self.router_gradient == "straight_through":
            # w + (p - p) is w to the bit. Its gradient is that of p, the softmax over all experts, alone: w is held
            # fixed, so that for K > 1 the router is not pulled by two softmaxes at once.
            full = torch.softmax(routing.logits, dim=-1).gather(-1, routing.experts)
            routing = routing._replace(weights=routing.weights.detach() + (full - full.detach()))
        elif self.num_experts_per_tok == 1:
            routing = routing._replace(weights=routing.weights.detach())
        for record in self._recorders:
            record(routing, self._token_mask)
        return routing

    def mix(self, x: Tensor, routing: Routing) -> Tensor:
        straight = self.num_experts_per_tok == 1 and routing.weights.requires_grad
        fixed = routing._replace(weights=routing.weights.detach()) if straight else routing
        sorts = x.device.type != "cpu" and len(self.experts) > 1 and all(map(is_plain, self.experts))
        y = self._mix_on_device(x, fixed) if sorts else super().mix(x, fixed)
        return weigh(y, routing.weights) if straight else self.with_gate(y, routing)

    def _mix_on_device(self, x: Tensor, routing: Routing) -> Tensor:
        """The published sum without waiting for the device, which alone knows how many rows each expert has."""
        per_token = self.num_experts_per_tok
        slots = x if per_token == 1 else x.unsqueeze(1).expand(-1, per_token, -1).reshape(-1, x.shape[-1])
        y = through_blocks(list(self.experts), slots, routing.experts.reshape(-1), compute_dtype(x))  # type: ignore[arg-type]
        if per_token == 1:
            return y
        weights = routing.weights.to(y.dtype)
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def with_gate(self, y: Tensor, routing: Routing) -> Tensor:
        """``y`` itself; where the router gets no gradient through it, one of zeros (see the class)."""
        if not routing.weights.requires_grad and torch.is_grad_enabled() and self.gate.weight.requires_grad:
            y = _ZeroGradient.apply(y, self.gate.weight)  # type: ignore[no-untyped-call]
        return y


def trainable_class(base: type[Any]) -> type[Any]:
    """transformers' ``base`` encoder with experts of this module, where a pickle of a model finds its class."""
    found = encoder_with_experts(base, MoELinear)  # type: ignore[arg-type]
    found.__module__ = __name__
    return found


def __getattr__(name: str) -> type[Any]:
    if name.startswith(CLASS_PREFIX) and hasattr(transformers, name.removeprefix(CLASS_PREFIX)):
        return trainable_class(getattr(transformers, name.removeprefix(CLASS_PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RoutingTape:
    """What the routers decided while ``record_routing`` was active.

    ``layers`` has one list per MoE layer, in the order of the encoder, with one ``Routing`` per call. Padding tokens
    are left out (the padded engine says which they are), gradients are kept.
    """

    def __init__(self, layers: int) -> None:
        self._calls: list[list[tuple[Routing, Tensor | None]]] = [[] for _ in range(layers)]

    def recorder(self, layer: int) -> Callable[[Routing, Tensor | None], None]:
        """The function that one layer calls with its routing."""
        return lambda routing, mask: self._calls[layer].append((routing, mask))

    def clear(self) -> None:
        """Forget what was recorded until now."""
        for calls in self._calls:
            calls.clear()

    @property
    def layers(self) -> list[list[Routing]]:
        # Padding is taken out here and not while recording: under activation checkpointing an extra operation in the
        # forward that the recomputation lacks would be an error.
        for calls in self._calls:
            for position, (routing, mask) in enumerate(calls):
                if mask is not None:
                    calls[position] = (Routing(*(part[mask] for part in routing)), None)
        return [[routing for routing, _ in calls] for calls in self._calls]


def _layers_of(model: nn.Module) -> list[MoELinear]:
    return [module for module in model.modules() if isinstance(module, MoELinear)]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTape]:
    """Record every routing of ``model``'s MoE layers inside the block; a model without experts gives no layers."""
    layers = _layers_of(model)
    tape = RoutingTape(len(layers))
    for number, layer in enumerate(layers):
        layer._recorders.append(tape.recorder(number))
    try:
        yield tape
    finally:
        for layer in layers:
            layer._recorders.pop()


@contextmanager
def token_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say which of the tokens in the next forward are real (``mask`` ``[N, L]`` bool), for the tape's sake."""
    layers = _layers_of(model)
    for layer in layers:
        layer._token_mask = mask.reshape(-1)
    try:
        yield
    finally:
        for layer in layers:
            layer._token_mask = None
