"""The forward of an XLM-R, RoBERTa or BERT encoder over sequences without padding.

Runs transformers' own modules and parameters, layer by layer, on the real tokens alone: every linear layer and every
pointwise operation sees all tokens of a slab as one matrix ``[T, D]``, attention runs by sequence (``attention.py``),
queries, keys and values come from one product, experts keep their tokens grouped (``feed_forward.py``), and
there is no pooler. If only the first token of each sequence is asked for, the last layer computes queries, output and
feed-forward for those alone, which changes nothing: other tokens' last states are read by nobody.

Dropout follows the configuration, at all its places. Layers below the lowest trained parameter keep no graph, since
nothing there needs a gradient. The numbers are those of the padded forward.

Shape legend: N sequences, T tokens in all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from FlagEmbedding.modeling.attention import packed_attention
from FlagEmbedding.modeling.compiled import CompiledEncoder, can_compile
from FlagEmbedding.modeling.dropout import dropout
from FlagEmbedding.modeling.feed_forward import feed_forward, residual_block
from FlagEmbedding.modeling.linear import apply_linear, prepack, side_by_side
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import token_ids
from FlagEmbedding.modeling.slabs import Layout
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError

# Where a layer has this attribute, it is called in the place of ``run_layer`` (see ``modeling.sharding``).
LAYER_METHOD = "packed_layer"


class WordTable(NamedTuple):
    """The word embeddings that a whole batch needs, looked up once for all its slabs.

    A lookup's gradient has the size of what it looked in. With one lookup per slab, every slab's backward would
    fill and add up a matrix of the whole vocabulary (1 GB in BGE-M3).

    Attributes:
        weight: ``[U, D]``, a vector for each distinct token.
        places: ``[T]`` int64, the vector of each token.
    """

    weight: Tensor
    places: Tensor

    @classmethod
    def of_slabs(cls, backbone: PreTrainedModel, slabs: Sequence[Tensor]) -> list[WordTable]:
        """For each slab's ids ``[T]`` the places in one table, which is looked up once."""
        ids = torch.cat(list(slabs))
        if ids.device.type == "cpu":
            distinct, places = torch.unique(ids, return_inverse=True)
        else:
            distinct, places = _distinct(ids)
        embeddings: Any = backbone.embeddings
        weight = embeddings.word_embeddings(distinct)
        return [cls(weight, own) for own in places.split([len(ids) for ids in slabs])]


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.unique`` without waiting to learn how many there are: ``[T]``, filled up with zeros, and the inverse."""
    sorted_ids, order = ids.sort()
    is_new = torch.ones_like(sorted_ids)
    is_new[1:] = (sorted_ids[1:] != sorted_ids[:-1]).long()
    rank = is_new.cumsum(0) - 1
    return torch.zeros_like(ids).scatter_(0, rank, sorted_ids), torch.empty_like(ids).scatter_(0, order, rank)


def packed_forward(
    backbone: PreTrainedModel,
    tokens: TokenBatch,
    *,
    first_tokens_only: bool = False,
    words: WordTable | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Last hidden states of the real tokens.

    Args:
        backbone: an encoder of the XLM-R, RoBERTa or BERT structure, dense or with experts.
        tokens: the sequences, best sorted by length (any order is right, equal lengths side by side are fast).
        first_tokens_only: give each sequence's first token alone.
        words: where to find these tokens' word embeddings; None: in the backbone.
        layout: where the sequences lie, if that is known already.

    Returns:
        ``[T, D]``, sequences end to end, or ``[N, D]``.

    Raises:
        UsageError: the backbone has another structure.
    """
    layout = Layout(tokens.lengths, tokens.ids.device) if layout is None else layout
    compiled: CompiledEncoder | None = backbone.__dict__.get("_compiled")
    if compiled is not None and compiled.takes(layout.tokens):
        return compiled.forward(tokens.ids, layout, first_tokens_only)
    reason = why_not_packable(backbone)
    if reason:
        raise UsageError(f"{type(backbone).__name__} {reason}: use --engine padded")
    encoder: Any = backbone.encoder
    x = _embed(backbone.embeddings, tokens.ids, layout, words)
    layers = list(encoder.layer)
    for number, layer in enumerate(layers):
        first_only = first_tokens_only and number == len(layers) - 1
        own = layer.__dict__.get(LAYER_METHOD, partial(run_layer, layer))
        run = partial(own, layout=layout, first_only=first_only)
        if getattr(backbone.config, "router", "learned") == "hash":
            run = partial(_with_ids, run, tokens.ids.index_select(0, layout.starts) if first_only else tokens.ids)
        if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            x = layer._gradient_checkpointing_func(run, x)
        else:
            x = run(x)
    if first_tokens_only and not layers:
        x = x.index_select(0, layout.starts)
    return x


def _with_ids(run: Callable[[Tensor], Tensor], ids: Tensor, x: Tensor) -> Tensor:
    """A layer whose router goes by ids: ``[T]``, or ``[N]`` where its feed-forward sees first tokens alone."""
    with token_ids(ids):
        return run(x)


def prepack_weights(backbone: nn.Module, rows: int) -> None:
    """Lay out the weights of an encoder that will not change, on a CPU.

    For the compiled encoder where it takes this one (``compiled.py``); where that takes small slabs alone, or nothing,
    for oneDNN's products of slabs of ``rows`` tokens (``linear.prepack``).
    """
    if why_not_packable(backbone):
        return
    if can_compile(backbone):
        compiled = backbone.__dict__["_compiled"] = CompiledEncoder(backbone)
        if compiled.most_tokens is None:
            compiled.lay_out()
            return
    encoder: Any = backbone.encoder
    for layer in encoder.layer:
        attention = layer.attention.self
        prepack(attention.query, attention.key, attention.value, rows=rows)
        for block in (layer.attention.output, layer.intermediate, layer.output):
            for each in getattr(block.dense, "experts", [block.dense]):
                prepack(each, rows=rows)


def compiled_for_all(backbone: nn.Module) -> bool:
    """Whether slabs of any size go through the compiled encoder, whose products know no sizes to compile code for."""
    compiled: CompiledEncoder | None = backbone.__dict__.get("_compiled")
    return compiled is not None and compiled.most_tokens is None


def why_not_packable(backbone: nn.Module) -> str | None:
    """Why this encoder cannot run packed; None if it can."""
    try:
        layers = backbone.encoder.layer  # type: ignore[union-attr]
        embeddings = backbone.embeddings
        parts = [embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings]  # type: ignore[union-attr]
        parts += [embeddings.LayerNorm, embeddings.dropout]  # type: ignore[union-attr]
        for layer in layers:  # type: ignore[union-attr]
            attention = layer.attention
            parts += [attention.self.query, attention.self.key, attention.self.value, attention.self.dropout]
            parts += [attention.output.dense, attention.output.LayerNorm, layer.intermediate.intermediate_act_fn]
            parts += [layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm]
    except AttributeError as error:
        return f"is not built like XLM-R, RoBERTa or BERT ({error})"
    config: Any = backbone.config
    if getattr(config, "is_decoder", False):
        return "is a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return f"has {config.position_embedding_type} position embeddings"
    return None


def _embed(embeddings: Any, ids: Tensor, layout: Layout, words: WordTable | None) -> Tensor:
    """``[T]`` ids to ``[T, D]``: word, position and token type 0, LayerNorm, dropout."""
    word = embeddings.word_embeddings(ids) if words is None else F.embedding(words.places, words.weight)
    x = word + embeddings.position_embeddings(_positions(embeddings, ids, layout))
    x = x + embeddings.token_type_embeddings.weight[0]
    return dropout(embeddings.LayerNorm(x), embeddings.dropout.p, embeddings.training)


def _positions(embeddings: Any, ids: Tensor, layout: Layout) -> Tensor:
    """``[T]`` position numbers: 0, 1, 2 … in BERT; in RoBERTa and XLM-R they begin after the padding index."""
    begins = layout.starts.index_select(0, layout.row_of_token)
    padding = getattr(embeddings, "padding_idx", None)
    if padding is None:
        return torch.arange(len(ids), device=ids.device) - begins
    # As transformers: a token that has the padding id counts for nothing, even amid a sequence.
    real = ids.ne(padding).long()
    counted = real.cumsum(0)
    before = (counted - real).index_select(0, begins)
    return (counted - before) * real + padding  # type: ignore[no-any-return]


def run_layer(layer: Any, x: Tensor, *, layout: Layout, first_only: bool) -> Tensor:
    """One encoder layer, ``[T, D]`` to ``[T, D]``, or to ``[N, D]`` where only first tokens are asked for."""
    attention = layer.attention.self
    attention_dropout = attention.dropout.p if attention.training else 0.0
    heads = attention.num_attention_heads
    if first_only:
        both = side_by_side(x, attention.key, attention.value)
        x = x.index_select(0, layout.starts)
        queries = apply_linear(attention.query, x)
        context = packed_attention(both, layout, heads, queries=queries, dropout=attention_dropout)
    else:
        all_three = side_by_side(x, attention.query, attention.key, attention.value)
        context = packed_attention(all_three, layout, heads, dropout=attention_dropout)
    output = layer.attention.output
    x = residual_block(output, context, x)
    return feed_forward(layer, x)
