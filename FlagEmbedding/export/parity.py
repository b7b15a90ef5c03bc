"""Does a graph give what the checkpoint gives: every output of every sample text, compared before anything is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.export.onnx_encoder import OnnxEncoder
from FlagEmbedding.export.samples import Samples
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.moe import record_routing
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
TOLERANCE = 1e-5  # largest difference of a value; vectors have length 1, greater token weights scale it
NEAR_TIE = 1e-4  # logits of two experts that are nearer than this: rounding decides which one a token goes to


def check_parity(
    encoder: TextEncoder, graph: OnnxEncoder, samples: Samples, dev: DevArguments, want: Sequence[Kind]
) -> float:
    """The largest difference between checkpoint and graph over the sample texts.

    Raises:
        DataError: it is beyond rounding; the line says in which output and for which text.
    """
    largest, ties = 0.0, 0
    for texts, length in samples.prefixed(encoder, dev):
        for start in range(0, len(texts), 64):
            window = texts[start : start + 64]
            ours, theirs = (next(iter(each.encode([(window, None)], length, want)))[0] for each in (encoder, graph))
            for place, text in enumerate(window):
                kind, apart = _apart(ours, theirs, place, want)
                if apart <= TOLERANCE:
                    largest = max(largest, apart)
                elif _near_tie(encoder, text, length):
                    ties += 1
                else:
                    raise DataError(
                        f"the graph gives other values than {encoder.name}: {kind} is off by {apart:.1e} (allowed: "
                        f"{TOLERANCE:.0e}) for {text[:60]!r}; nothing was written"
                    )
    if ties:
        logger.info("%d texts left out: two experts are so near for a token that rounding decides between them", ties)
    return largest


def _apart(ours: Representations, theirs: Representations, place: int, want: Sequence[Kind]) -> tuple[Kind, float]:
    """The output of text number ``place`` that differs most, and by how much; of large values as a share of them."""
    found = []
    for kind in want:
        one, other = (_values(each, place, kind) for each in (ours, theirs))
        if one.shape != other.shape:
            return kind, float("inf")
        scale = float(one.abs().max()) if one.numel() else 0.0
        apart = float((one - other).abs().max()) / max(1.0, scale) if one.numel() else 0.0
        found.append((apart if apart == apart else float("inf"), kind))
    worst = max(found)
    return worst[1], worst[0]


def _values(found: Representations, place: int, kind: Kind) -> torch.Tensor:
    start = sum(found.tokens.lengths[:place])
    length = found.tokens.lengths[place]
    if kind == "dense":
        assert found.dense is not None
        return found.dense[place].float()
    if kind == "sparse":
        assert found.token_weights is not None
        return found.token_weights[start : start + length].float()
    assert found.colbert is not None
    return found.colbert[start - place : start - place + length - 1].float()


def _near_tie(encoder: TextEncoder, text: str, length: int) -> bool:
    """Whether the choice between two experts hangs on rounding for some token of the text."""
    with record_routing(encoder.encoder) as tape:
        list(encoder.encode([([text], None)], length))
        for routing in (call for calls in tape.layers for call in calls):
            chosen = routing.experts.shape[1]
            ordered = routing.logits.sort(dim=-1, descending=True).values
            if chosen < ordered.shape[1] and float((ordered[:, chosen - 1] - ordered[:, chosen]).min()) < NEAR_TIE:
                return True
    return False
