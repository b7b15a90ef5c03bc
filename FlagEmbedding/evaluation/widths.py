"""Measures of vectors that are cut to fewer dimensions: everything is encoded once, and searched at each width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from FlagEmbedding.evaluation.live import DevCollection
from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.systems import LanguageScores, System
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.utils.processes import on_main


def score_widths(
    encoder: TextEncoder, collections: Sequence[DevCollection], measures: Sequence[Measure], widths: Sequence[int]
) -> dict[int, System]:
    """``encoder`` as a system at each of ``widths``, the same on every process, which call it together."""
    by_name = {each.name: _score(encoder, each, measures, widths) for each in collections}
    return {width: System(f"{width} dimensions", {n: own[width] for n, own in by_name.items()}) for width in widths}


def _score(
    encoder: TextEncoder, collection: DevCollection, measures: Sequence[Measure], widths: Sequence[int]
) -> dict[int, LanguageScores]:
    queries, passages = collection.vectors(encoder)

    def scores() -> dict[int, LanguageScores]:
        pairs = {width: (_cut(queries, width, encoder), _cut(passages, width, encoder)) for width in widths}
        hits = {width: collection.hits(encoder, *pair) for width, pair in pairs.items()}
        return {width: collection.judge(own, measures) for width, own in hits.items()}

    return on_main(scores)


def _cut(vectors: np.ndarray | None, width: int, encoder: TextEncoder) -> np.ndarray:
    """``[N, width]``, normalized again where the encoder normalizes; the full width as it is."""
    assert vectors is not None
    if width >= vectors.shape[1]:
        return vectors
    part = np.ascontiguousarray(vectors[:, :width])
    if encoder.options.normalize_embeddings:
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return part
