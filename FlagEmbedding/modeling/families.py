"""How an encoder may be computed: known by its class, and tried out when it is loaded.

Many encoders are built like BERT and compute something else: other inputs are added to the embeddings, attention is
approximate, neighbors are mixed across padding. So the packed engine serves the classes of ``PACKED`` alone, and only
after three short sequences went through it and through the class's own forward with the same result. All others run
through their own forward, padded; where padding itself changes a class's vectors (a convolution over tokens, a Fourier
transform), sequences of equal length at a time. What cannot encode text is refused in one line.

``benchmarks/families.py`` prints what becomes of every class of the installed transformers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.modeling.moe import MoELinear
from FlagEmbedding.modeling.packed import packed_forward, why_not_packable
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import CLASS_PREFIX
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

Way = Literal["packed", "padded", "equal lengths"]

# Classes whose forward was read and compared with the packed one; a configuration may still differ (ERNIE's task ids).
PACKED = frozenset(
    f"{family}Model"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Data2VecText", "Electra", "Ernie", "Splinter")
)
_LENGTHS = (11, 6, 3)
# Largest difference of a token's state, as a share of the states' norm, that rounding explains: between two ways to
# compute it, and between two places of one batch.
_ROUNDING = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-3, 1e-6)}
_HALF_ROUNDING = (0.1, 5e-3)


@dataclass(frozen=True)
class Family:
    """What trying out an encoder showed.

    Attributes:
        way: ``packed``; ``padded``: by the class's own forward; ``equal lengths``: likewise, without any padding.
        causal: a token sees no later ones, so that the first token's state is the same for every text.
        note: why it is not packed, one line; empty where it is, or where packed was not asked for.
    """

    way: Way
    causal: bool
    note: str = ""


def try_out(backbone: PreTrainedModel, packed: bool = True) -> Family:
    """Encode three short sequences in the ways that are possible, and take the fastest that is right.

    Costs two forwards of 20 tokens for a class of ``PACKED``; draws no random number and leaves the model as it was.

    Args:
        packed: False: do not consider the packed engine.

    Raises:
        UsageError: this is no encoder of text.
    """
    name, device = type(backbone).__name__, next(backbone.parameters()).device
    training = backbone.training
    backbone.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            return _try_out(backbone, name, _sequences(backbone, device), packed)
    finally:
        backbone.train(training)


def own_forward(backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The class's own last hidden states ``[N, L, D]`` of ``ids`` and ``mask`` ``[N, L]``; no cache of a decoder."""
    cache = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    return backbone(input_ids=ids, attention_mask=mask, **cache).last_hidden_state  # type: ignore[no-any-return]


def pad_id(backbone: PreTrainedModel) -> int:
    """What stands in the places beyond a sequence's end, which nobody reads."""
    return int(getattr(backbone.config, "pad_token_id", None) or 0)


def _try_out(backbone: PreTrainedModel, name: str, tokens: TokenBatch, packed: bool) -> Family:
    ids, mask = tokens.pad(pad_id(backbone))
    padded = _states(backbone, name, ids, mask)[mask.bool()]
    width = getattr(backbone.config, "hidden_size", None)
    if width != padded.shape[1]:
        raise UsageError(f"{name} gives states of {padded.shape[1]} dimensions, its config.json says {width}: refused")
    # Two sequences have the first token in common and nothing else.
    first, second = (_apart(padded[[at]], padded[[at + tokens.lengths[0]]], padded, all_tokens=True) for at in (0, 1))
    causal = first < _tolerance(padded, same=True) <= second
    known = name.removeprefix(CLASS_PREFIX) in PACKED
    if not packed:
        note = ""
    elif not known:
        note = "the packed engine was not proved right for this class"
    elif reason := why_not_packable(backbone):
        note = f"this one {reason}"
    else:
        experts = any(isinstance(module, MoELinear) for module in backbone.modules())
        error = _error_of_packed(backbone, tokens, padded, experts)
        if error is not None and error <= _tolerance(padded):
            return Family("packed", causal)
        what = "fails" if error is None else f"gives other vectors (off by {error:.0%})"
        note = f"with this configuration the packed engine {what}"
    if known:
        return Family("padded", causal, note)
    alone = torch.cat([_states(backbone, name, row[None], torch.ones_like(row[None]))[0] for row in _rows(tokens)])
    same = _apart(padded, alone, alone, all_tokens=True) <= _tolerance(padded)
    return Family("padded" if same else "equal lengths", causal, note)


def _sequences(backbone: PreTrainedModel, device: torch.device) -> TokenBatch:
    """Three sequences of one first token, which differ from there on, without special tokens."""
    config: Any = backbone.config
    words = int(getattr(config, "vocab_size", None) or 1_000)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    special = {getattr(config, name, None) for name in names}
    usable = [token for token in range(min(words, 4_000)) if token not in special] or [0]
    limit = longest_input(backbone)
    lengths = [length if limit is None else max(1, min(length, limit)) for length in _LENGTHS]
    first = usable[len(usable) // 2]
    rows = [
        [first, *(usable[(len(usable) // 3 + 37 * place + 11 * number) % len(usable)] for place in range(1, length))]
        for number, length in enumerate(lengths)
    ]
    return TokenBatch.from_lists(rows, device)


def _rows(tokens: TokenBatch) -> list[Tensor]:
    return list(tokens.ids.split(tokens.lengths))  # type: ignore[no-untyped-call]


def _states(backbone: PreTrainedModel, name: str, ids: Tensor, mask: Tensor) -> Tensor:
    """``own_forward``, every way in which it can fail being one line."""
    try:
        states = own_forward(backbone, ids, mask)
    except Exception as error:  # foreign code: whatever it raises means the same here
        what = f"of {ids.shape[1]} tokens " if len(ids) == 1 else ""
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{name} encodes no text {what}by itself, so it cannot be used here ({reason})") from error
    if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
        raise UsageError(f"{name} encodes no text by itself: it gives no state for each token")
    if not states.isfinite().all():
        raise UsageError(f"{name} gives states that are not finite, in {states.dtype}: the weights may be broken")
    return states


def _error_of_packed(backbone: PreTrainedModel, tokens: TokenBatch, padded: Tensor, experts: bool) -> float | None:
    try:
        states = packed_forward(backbone, tokens)
    except Exception as error:  # noqa: BLE001 — widths that do not fit, modules of another kind: this encoder only looks like BERT
        logger.debug("packed: %s", error)
        return None
    # A near tie may send a token to another expert; a wrong forward moves most of them.
    return _apart(states, padded, padded, all_tokens=not experts)


def _apart(one: Tensor, other: Tensor, scale: Tensor, all_tokens: bool) -> float:
    """Largest distance of two tokens' states (or the median one) by the mean norm of ``scale``'s."""
    if one.shape != other.shape:
        return float("inf")
    distances = (one.double() - other.double()).norm(dim=-1)
    distance = distances.max() if all_tokens else distances.median()
    return float(distance / scale.double().norm(dim=-1).mean().clamp_min(1e-12))


def _tolerance(states: Tensor, same: bool = False) -> float:
    return _ROUNDING.get(states.dtype, _HALF_ROUNDING)[same]
