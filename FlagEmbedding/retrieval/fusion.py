"""Several scores of a passage as one: weighted means as upstream's ``compute_score``, and reciprocal rank fusion.

A weighted mean is ``Σ w · s / Σ w`` over the parts of a mode, BGE-M3's weights being 1, 0.3 and 1 for dense, sparse and
colbert (Chen et al. 2024, section 4.1). Every candidate has every part's own score: what one part alone has found is
scored by the others too, so there is no score to make up. Reciprocal ranks (Cormack et al. 2009) add up
``(k + 1) / (k + rank)`` over the parts, divided by their number: 1 for what is first everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from FlagEmbedding.retrieval.searcher import Hit, rank
from FlagEmbedding.utils.modes import Mode, Part

Weights = Mapping[Part, float]


@dataclass(frozen=True)
class Found:
    """What is known of one query.

    Attributes:
        ranked: of each part that searches the collection, rows, best first.
        rows: all candidates, ascending.
        scores: of each part, the scores of ``rows``, float64.
    """

    ranked: Mapping[Part, np.ndarray]
    rows: np.ndarray
    scores: Mapping[Part, np.ndarray]

    def of(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """A part's scores of some of the candidates."""
        return self.scores[part][np.searchsorted(self.rows, rows)]


@dataclass(frozen=True)
class Fusing:
    """How parts become one list.

    Attributes:
        weights: of each part, for weighted means.
        rrf_k: k of reciprocal ranks.
        rerank: so many candidates of each searching part are scored by colbert; 0: colbert searches by itself.
        rerank_from: the parts whose candidates colbert alone reranks.
    """

    weights: Weights
    rrf_k: int = 60
    rerank: int = 200
    rerank_from: tuple[Part, ...] = ("dense",)

    def searching(self, mode: Mode) -> list[Part]:
        """The parts that find the candidates of ``mode``."""
        if self.rerank and mode.parts == ("colbert",):
            return list(self.rerank_from)
        return [part for part in mode.parts if part != "colbert" or not self.rerank]

    def depth(self, mode: Mode, top_k: int) -> int:
        """How many candidates each of them gives."""
        return self.rerank if "colbert" in mode.parts and self.rerank else top_k


def candidates(mode: Mode, ranked: Mapping[Part, np.ndarray], how: Fusing, top_k: int) -> np.ndarray:
    """The rows that take part in ``mode`` for one query, ascending."""
    depth = how.depth(mode, top_k)
    return np.unique(np.concatenate([ranked[part][:depth] for part in how.searching(mode)]))


def fuse(mode: Mode, found: Found, how: Fusing, docids: Sequence[str], top_k: int) -> list[Hit]:
    """The ``top_k`` best passages of one query."""
    rows = candidates(mode, found.ranked, how, top_k)
    if mode.fusion != "rrf":
        weights = how.weights if len(mode.parts) > 1 else {mode.parts[0]: 1.0}
        return rank(docids, weighted_mean(mode.parts, found, rows, weights), rows, top_k)
    scores, depth = np.zeros(len(rows)), how.depth(mode, top_k)
    for part in mode.parts:
        order = found.ranked[part][:depth] if part in found.ranked else _by_score(found.of(part, rows), rows, docids)
        scores[np.searchsorted(rows, order)] += (how.rrf_k + 1) / (how.rrf_k + 1 + np.arange(len(order)))
    return rank(docids, scores / len(mode.parts), rows, top_k)


def weighted_mean(parts: Sequence[Part], found: Found, rows: np.ndarray, weights: Weights) -> np.ndarray:
    """``Σ w · s / Σ w`` of each of ``rows``."""
    total = sum(weights[part] for part in parts)
    summed: np.ndarray = np.sum([weights[part] / total * found.of(part, rows) for part in parts], axis=0)
    return summed


def _by_score(scores: np.ndarray, rows: np.ndarray, docids: Sequence[str]) -> np.ndarray:
    return np.array([hit.row for hit in rank(docids, scores, rows, len(rows))], dtype=np.int64)
