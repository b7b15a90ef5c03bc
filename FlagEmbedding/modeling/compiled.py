"""A whole encoder in one compiled call (``kernels/encoder.h``), for vectors without gradients in float32 on a CPU.

At load the weights are laid out for it and all that a call could have asked is asked once, so that a single query costs
the arithmetic and little else. It computes what ``packed.py`` computes, up to rounding, on one thread; a sequence's
states depend on nothing but the sequence, whatever stands beside it, to the last bit.

A model's weights may change after that, or be hooked: every call looks whether each module and parameter is the one
that was laid out, and unchanged.

Shape legend: N sequences, T tokens in all, D hidden size.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cached_property
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from FlagEmbedding.modeling import kernels
from FlagEmbedding.modeling.linear import is_plain
from FlagEmbedding.modeling.moe import ExpertLinear, MoELinear
from FlagEmbedding.modeling.pointwise import is_exact_gelu
from FlagEmbedding.modeling.slabs import Layout

FEW_ROWS = 64


class CompiledEncoder:
    """An encoder's weights as the kernels read them, and whether they are still the encoder's.

    Takes as much memory as the layers' weights again, from the first use on.

    Args:
        backbone: an encoder for which :func:`can_compile` says yes.

    Attributes:
        most_tokens: with more tokens than this oneDNN's products, with their weights laid out, are taken to be faster:
            AVX-512 processors, where this was not measured.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._watch = _Watch(backbone)
        self._kept: list[Any] = []  # what the structures point to
        self._lock = threading.Lock()
        self.most_tokens = FEW_ROWS if kernels.vector_lanes() == 16 else None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied or pickled model goes without: what was laid out is not the copy's."""
        return type(None), ()

    def takes(self, tokens: int) -> bool:
        """Whether to use it for so many tokens: not where anything that was laid out has changed (a weight, a module,
        its hooks), in training, with gradients, or where autocast asks for another dtype."""
        few = self.most_tokens is None or tokens <= self.most_tokens
        as_laid_out = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return few and as_laid_out and not self._backbone.training and self._watch.unchanged()

    def forward(self, ids: Tensor, layout: Layout, first_tokens_only: bool) -> Tensor:
        """Last hidden states of the tokens ``ids`` ``[T]``, ``[T, D]``, or of first tokens alone, ``[N, D]``."""
        self.lay_out()
        rows = len(layout.lengths) if first_tokens_only else layout.tokens
        output = torch.empty(rows, self._encoder.hidden, dtype=torch.float32)
        unknown = kernels.encode(self._encoder, ids.contiguous(), layout.cumulative, first_tokens_only, output)
        if unknown >= 0:
            raise IndexError(f"token {unknown} (id {int(ids[unknown])}) lies outside the embedding tables")
        return output

    def lay_out(self) -> None:
        """Do now what the first call would do."""
        with self._lock:
            _ = self._encoder

    @cached_property
    def _encoder(self) -> kernels.Encoder:
        parts: Any = self._backbone
        embeddings, layers = parts.embeddings, list(parts.encoder.layer)
        words, places = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
        padding = getattr(embeddings, "padding_idx", None)
        return kernels.Encoder(
            words=self._pointer(words),
            positions=self._pointer(places),
            type=self._pointer(embeddings.token_type_embeddings.weight),
            vocabulary=len(words),
            longest=len(places),
            padding=-1 if padding is None else padding,
            norm=self._norm(embeddings.LayerNorm),
            layers=self._array(kernels.EncoderLayer, [self._layer(layer) for layer in layers]),
            count=len(layers),
            hidden=words.shape[1],
            heads=layers[0].attention.self.num_attention_heads if layers else 1,
        )

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.detach().contiguous())
        return int(self._kept[-1].data_ptr())

    def _array(self, kind: Any, items: list[Any]) -> int:
        self._kept.append((kind * len(items))(*items))
        return ctypes.addressof(self._kept[-1])

    def _linear(self, module: Any) -> kernels.EncoderLinear:
        panels = kernels.lay_out(module.weight.detach().contiguous())
        bias = None if module.bias is None else self._pointer(module.bias)
        return kernels.EncoderLinear(self._pointer(panels), bias, module.in_features, module.out_features)

    def _norm(self, module: Any) -> kernels.EncoderNorm:
        return kernels.EncoderNorm(self._pointer(module.weight), self._pointer(module.bias), module.eps)

    def _layer(self, layer: Any) -> kernels.EncoderLayer:
        attention, wide, narrow = layer.attention, layer.intermediate.dense, layer.output.dense
        experts = [[*each.experts] if isinstance(each, ExpertLinear) else [each] for each in (wide, narrow)]
        gates = [
            each.gate.weight for each in (wide, narrow) if isinstance(each, ExpertLinear) and len(each.experts) > 1
        ]
        return kernels.EncoderLayer(
            **{name: self._linear(getattr(attention.self, name)) for name in ("query", "key", "value")},
            output=self._linear(attention.output.dense),
            attention_norm=self._norm(attention.output.LayerNorm),
            wide=self._array(kernels.EncoderLinear, [self._linear(each) for each in experts[0]]),
            narrow=self._array(kernels.EncoderLinear, [self._linear(each) for each in experts[1]]),
            wide_experts=len(experts[0]),
            narrow_experts=len(experts[1]),
            gate=self._pointer(gates[0]) if gates else None,
            output_norm=self._norm(layer.output.LayerNorm),
        )


class _Watch:
    """Whether the modules and parameters of an encoder are those that they were, unchanged and without hooks.

    Looked at in every call: by lists that C code walks through, 0.1 ms for 12 layers on an AVX2 processor.
    """

    def __init__(self, backbone: nn.Module) -> None:
        links: list[tuple[dict[str, Any], str]] = [(backbone._modules, name) for name in ("embeddings", "encoder")]
        modules: list[nn.Module] = []
        for own, name in links:  # grows on the way
            if (module := own[name]) is not None:
                modules.append(module)
                links += [(module._modules, each) for each in module._modules]
        links += [(each._parameters, name) for each in modules for name in each._parameters]
        self._owners: list[dict[str, Any]] = [own for own, _ in links]
        self._names = [name for _, name in links]
        self._things = [own[name] for own, name in links]
        self._inside: list[dict[str, Any]] = [each._modules for each in modules]
        self._counts = list(map(len, self._inside))
        self._tensors: list[Tensor] = [each for each in self._things if isinstance(each, Tensor)]
        self._state = self._contents()
        self._hooks: list[Any] = [each._forward_hooks for each in modules]
        self._hooks += [each._forward_pre_hooks for each in modules]
        self._hooks += [each._recorders for each in modules if isinstance(each, MoELinear)]

    def unchanged(self) -> bool:
        """False once anything changed."""
        return (
            all(map(is_, map(dict.get, self._owners, self._names), self._things))
            and list(map(len, self._inside)) == self._counts
            and self._contents() == self._state
            and not any(self._hooks)
        )

    def _contents(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors), *map(attrgetter("_version"), self._tensors)]


def can_compile(backbone: Any) -> bool:
    """Whether the kernels compute this packable encoder: float32, exact GELU, plain layers, whole vectors."""
    embeddings, layers = backbone.embeddings, list(backbone.encoder.layer)
    tables = [embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings]
    norms, linears, mixtures, activations, heads = [embeddings.LayerNorm], [], [], [], set()
    for layer in layers:
        own = layer.attention.self
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
        linears += [own.query, own.key, own.value, layer.attention.output.dense]
        feed_forward = [layer.intermediate.dense, layer.output.dense]
        mixtures += [each for each in feed_forward if isinstance(each, ExpertLinear)]
        linears += [linear for each in feed_forward for linear in getattr(each, "experts", [each])]
        if all(isinstance(each, ExpertLinear) for each in feed_forward):
            return False
        activations.append(layer.intermediate.intermediate_act_fn)
        heads.add((own.num_attention_heads, own.query.out_features))
    width = embeddings.word_embeddings.weight.shape[1]
    return (
        all(kernels.available(each) and each.dtype == torch.float32 for each in backbone.parameters())
        and not any(each.is_inference() for each in backbone.parameters())  # changes to them cannot be seen
        and all(type(each) is nn.Embedding and each.max_norm is None for each in tables)
        and all(type(each) is nn.LayerNorm and each.bias is not None for each in norms)
        and all(map(is_plain, linears))
        and all(each.in_features % 16 == each.out_features % 16 == 0 for each in linears)
        and all(each.num_experts_per_tok == 1 and each.router == "learned" for each in mixtures)
        and all(map(is_exact_gelu, activations))
        and len(heads) <= 1
        and all(out == width and out // count % 16 == 0 for count, out in heads)
    )
