"""Options that the encoder reads: which of its layers become experts, and how it is computed.

Imports no torch, so that a command can parse these before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError

FfnPart = Literal["intermediate", "output"]
RouterGradient = Literal["none", "straight_through"]
RouterKind = Literal["learned", "hash"]
EngineName = Literal["packed", "padded"]
Pooling = Literal["cls", "mean", "last_token"]
POOLING_SPELLINGS = {"last": "last_token", "lasttoken": "last_token"}
MOST_SLAB_TOKENS = 32_768  # of a GPU in training
SLAB_TOKENS = 2_048  # a slab (``modeling/slabs.py``) of this size stays in a processor's cache


@dataclass(frozen=True)
class MoEConfig:
    """Experts.

    Attributes:
        moe: ``intermediate`` (H to I), ``output`` (I to H), or None: the model as it is.
        only_train: train only ``encoder.layer.*.{this}.dense.*``; None: everything.
        num_experts: E, copies of the dense layer.
        num_experts_per_tok: K.
        router_gradient: ``none``: as published, so with K = 1 the router gets no gradient; ``straight_through``: the
            same forward to the bit, and the gradient of the softmax over all E reaches the router.
        router_jitter: while training, the router's input is multiplied by uniform noise in ``1 ± router_jitter``.
        router: ``learned``: a gate, as published; ``hash``: the expert is a fixed function of the token's id.

    Raises:
        UsageError: values that do not fit together.
    """

    moe: FfnPart | None = choice(
        FfnPart, None, "Which linear of every feed-forward becomes experts: intermediate (H to I) or output (I to H)."
    )
    only_train: FfnPart | None = choice(
        FfnPart, None, "Train only encoder.layer.*.{this}.dense.* (experts and router included)."
    )
    num_experts: int = option(1, "Copies of each linear (N).")
    num_experts_per_tok: int = option(1, "Experts a token is sent to (k).")
    router_gradient: RouterGradient = choice(
        RouterGradient,
        "none",
        "none: as published (with k = 1 the router gets no gradient at all); straight_through: the same forward to "
        "the bit, and the gradient of the full softmax reaches the router.",
    )
    router_jitter: float = option(0.0, "The router's input is multiplied by uniform noise in 1 ± this while training.")
    router: RouterKind = choice(
        RouterKind,
        "learned",
        "learned: a gate over hidden states, as published; hash: a token's id alone decides, for good (a control).",
    )

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise UsageError(complaint)

    def _complaints(self) -> list[str]:
        found = []
        for name in ("moe", "only_train"):
            if getattr(self, name) not in (None, *get_args(FfnPart)):
                found.append(f"--{name} must be intermediate, output or left out, got {getattr(self, name)!r}")
        if self.router_gradient not in get_args(RouterGradient):
            found.append(f"--router_gradient must be none or straight_through, got {self.router_gradient!r}")
        for name in ("num_experts", "num_experts_per_tok"):
            if getattr(self, name) < 1:
                found.append(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.num_experts_per_tok > self.num_experts:
            found.append(
                f"--num_experts_per_tok {self.num_experts_per_tok} is more than --num_experts {self.num_experts}: a "
                "token cannot be sent to more experts than there are"
            )
        if self.moe is None and self.num_experts > 1:
            found.append(
                f"--num_experts {self.num_experts} has no effect without --moe: add --moe intermediate or --moe output"
            )
        if self.moe and self.only_train and self.moe != self.only_train:
            found.append(
                f"--moe {self.moe} with --only_train {self.only_train} would leave every expert frozen: use "
                f"--only_train {self.moe} or leave --only_train out"
            )
        if not 0 <= self.router_jitter < 1:
            found.append(f"--router_jitter must be in [0, 1), got {self.router_jitter}")
        return found + self._of_the_router()

    def _of_the_router(self) -> list[str]:
        if self.router == "learned":
            return []
        if self.router not in get_args(RouterKind):
            return [f"--router must be learned or hash, got {self.router!r}"]
        found = []
        if self.moe is None:
            found.append("--router hash has no effect without --moe (a checkpoint with experts says its router itself)")
        elif self.num_experts == 1:
            found.append("--router hash has no effect with one expert: raise --num_experts")
        if self.num_experts_per_tok > 1:
            found.append("--router hash sends each token to one expert: leave --num_experts_per_tok at 1")
        for name, value in (("router_gradient", self.router_gradient), ("router_jitter", self.router_jitter)):
            if value not in ("none", 0):
                found.append(f"--{name} has no effect with --router hash, which has nothing to learn")
        return found


@dataclass(frozen=True)
class EngineConfig:
    """Engine: how the encoder is computed; no result depends on it.

    Attributes:
        engine: ``packed`` (no padding) or ``padded`` (transformers' forward).
        slab_tokens: packed: at most this many tokens at a time (a longer sequence goes alone); 0: the batch as one;
            None: what stays in a processor's cache, on a GPU what half of its free memory holds.
        grad_cache: packed: keep one slab's activations at a time and compute each slab again in the backward.
        enable_sub_batch: padded: at most so many sequences at a time as the published table says.
    """

    engine: EngineName = choice(EngineName, "packed", "packed computes no padding; padded is the plain reference path.")
    slab_tokens: int | None = option(
        None,
        "Packed engine: at most this many tokens at a time; 0: the batch as one (default: 2048 on a CPU, on a GPU what "
        "half of its free memory holds, up to 32768).",
    )
    grad_cache: bool = switch(
        False,
        "Gradient caching: keep one slab's activations at a time and compute each slab twice, so that memory does not "
        "grow with the batch (same gradients).",
    )
    enable_sub_batch: bool = switch(True, "Padded engine: encode in slices chosen by length, as published.")

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineName):
            raise UsageError(f"--engine must be packed or padded, got {self.engine!r}")
        if self.slab_tokens is not None and self.slab_tokens < 0:
            raise UsageError(f"--slab_tokens must be 0 (the batch as one) or more, got {self.slab_tokens}")
        if self.grad_cache and self.engine == "padded":
            raise UsageError("--grad_cache works on the slabs of --engine packed: leave --engine padded out")
