"""An encoder whose feed-forward layers hold experts: the published forward, and nothing needed for training.

This file is written beside the weights of every such checkpoint, so that ``AutoModel`` and ``SentenceTransformer``
can load it with ``trust_remote_code=True``; it needs torch and transformers only. It is also the one definition of
the layer in the package that wrote it: training builds on these classes.

Shape legend: T tokens, E experts, K experts chosen per token, H and I the widths in and out.
"""

import copy
import functools
import inspect
import json
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

CLASS_PREFIX = "MoE"
# The weights file that config.json names for whoever does not know the experts; no such file exists. Without it,
# transformers' own class would load this checkpoint with random feed-forward layers.
GUARD = "this-model-has-experts--load-it-with-trust_remote_code=True.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


_TOKENS: ContextVar[Tensor | None] = ContextVar("_TOKENS", default=None)  # a thread's own


@contextmanager
def token_ids(ids: Tensor | None) -> Iterator[None]:
    """Say which tokens the rows of the next forwards are, for routers that go by them."""
    before = _TOKENS.set(ids)
    try:
        yield
    finally:
        _TOKENS.reset(before)


def hashed_experts(experts: int) -> Tensor:
    """The expert of each token, as ``token_ids`` told of them: Knuth's multiplicative hash of the id, modulo E."""
    ids = _TOKENS.get()
    if ids is None:
        raise ValueError("the experts of this model go by token ids: give input_ids, not inputs_embeds")
    return ids * 2654435761 % 4294967296 // 65536 % experts


class Routing(NamedTuple):
    """What the router decided for T tokens.

    Attributes:
        logits: ``[T, E]``, float32 (float64 in a float64 model).
        experts: ``[T, K]`` int64, the chosen experts, greatest logit first.
        weights: ``[T, K]``, dtype of ``logits``: softmax over the chosen logits.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor


class ExpertLinear(nn.Module):
    """E linear layers in the place of one, and a gate that sends each token to K of them.

    With ``router`` ``hash`` a token's expert is a fixed function of its id instead (Roller et al. 2021, Hash Layers),
    and the gate, of zeros, is read by nobody.

    ``y = sum_k softmax(top_K(gate(x)))_k * expert_k(x)``, the softmax being over the K chosen logits alone. With
    K = 1 the weight is therefore the constant 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        num_experts: int,
        num_experts_per_tok: int,
        router: str = "learned",
    ):
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(nn.Linear(in_features, out_features, bias=bias) for _ in range(num_experts))
        self.gate = nn.Linear(in_features, num_experts, bias=False)
        self.num_experts_per_tok = num_experts_per_tok

    def router_logits(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, E]`` in float32 at least, whatever autocast says: near ties decide who computes."""
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(precise), self.gate.weight.to(precise))

    def route(self, x: Tensor) -> Routing:
        """Choose K experts for every row of ``x`` ``[T, H]``."""
        if self.router == "hash":
            return self.by_hash(x)
        logits = self.router_logits(x)
        chosen, experts = torch.topk(logits, self.num_experts_per_tok, dim=-1)
        return Routing(logits, experts, torch.softmax(chosen, dim=-1))

    def by_hash(self, x: Tensor) -> Routing:
        """The choice by token ids; its logits say that it is certain."""
        experts = hashed_experts(len(self.experts)).reshape(-1, 1)
        if len(experts) != len(x):
            raise ValueError(f"{len(x)} rows came to a router that was told of {len(experts)} tokens")
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = torch.full((len(x), len(self.experts)), -1e4, dtype=precise, device=x.device)
        logits = logits.scatter(1, experts, 0.0)
        return Routing(logits, experts, torch.ones_like(logits[:, :1]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., I]``."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.mix(rows, self.route(rows))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def mix(self, x: Tensor, routing: Routing) -> Tensor:
        """Run every expert on its own tokens, in one piece each, and sum by weight: ``[T, H]`` to ``[T, I]``."""
        per_token = self.num_experts_per_tok
        if len(self.experts) == 1:
            y = self.experts[0](x)
        else:
            slots = routing.experts.reshape(-1)  # [T*K]
            order = torch.argsort(slots, stable=True)
            counts = torch.bincount(slots, minlength=len(self.experts)).tolist()
            # Expanding before the permutation makes the backward a permutation and a sum: no atomics, so it repeats.
            wide = x if per_token == 1 else x.unsqueeze(1).expand(-1, per_token, -1).reshape(-1, x.shape[-1])
            pieces = wide.index_select(0, order).split(counts)  # type: ignore[no-untyped-call]
            # An expert without tokens runs on zero rows, so that its parameters take part in the backward (DDP).
            y = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)])
            back = torch.empty_like(order)
            back[order] = torch.arange(order.numel(), device=order.device)
            y = y.index_select(0, back)  # [T*K, I]
        if per_token == 1 and not routing.weights.requires_grad:
            return y  # type: ignore[no-any-return]  # the weight is exactly 1
        weights = routing.weights.to(y.dtype)
        if per_token == 1:
            return y * weights  # type: ignore[no-any-return]
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)  # type: ignore[no-any-return]


def expert_places(model: Any, moe: str) -> list[Any]:
    """The modules whose ``dense`` becomes experts, one a layer: ``encoder.layer.*.{intermediate|output}``."""
    return [getattr(layer, moe) for layer in model.encoder.layer]


@functools.cache
def encoder_with_experts(base: type[Any], layer_class: type[ExpertLinear] = ExpertLinear) -> type[Any]:
    """A subclass of transformers' ``base`` encoder that has experts where its configuration says so."""

    class Encoder(base):  # type: ignore[misc]
        def __init__(self, config: Any, add_pooling_layer: bool = False, **kwargs: Any) -> None:
            if "add_pooling_layer" in inspect.signature(base).parameters:
                kwargs["add_pooling_layer"] = add_pooling_layer
            super().__init__(config, **kwargs)
            for place in expert_places(self, config.moe):
                dense = place.dense
                place.dense = layer_class(
                    dense.in_features,
                    dense.out_features,
                    dense.bias is not None,
                    config.num_experts,
                    config.num_experts_per_tok,
                    router=getattr(config, "router", "learned"),
                )

        @functools.wraps(base.forward)
        def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            with token_ids(input_ids):
                return super().forward(input_ids, *args, **kwargs)

        @classmethod
        def from_pretrained(cls, name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            if not isinstance(config, transformers.PretrainedConfig):
                source = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
                config = cls.config_class.from_pretrained(config or name_or_path, **source)
            config = copy.deepcopy(config)
            if getattr(config, "transformers_weights", None) == GUARD:
                del config.transformers_weights
            return super().from_pretrained(name_or_path, *args, config=config, **kwargs)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            file = pathlib.Path(save_directory, "config.json")
            if file.is_file():  # transformers drops the field; without it the copy would be unguarded
                fields = json.loads(file.read_text(encoding="utf-8")) | {"transformers_weights": GUARD}
                file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    # Remote code is known by the name of its module, which transformers has made unique.
    Encoder.__module__ = __name__
    Encoder.__name__ = Encoder.__qualname__ = CLASS_PREFIX + base.__name__
    return Encoder


def __getattr__(name: str) -> type[Any]:
    # ``auto_map`` names a class of this module: MoEXLMRobertaModel is transformers' XLMRobertaModel with experts.
    if name.startswith(CLASS_PREFIX) and hasattr(transformers, name.removeprefix(CLASS_PREFIX)):
        return encoder_with_experts(getattr(transformers, name.removeprefix(CLASS_PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
