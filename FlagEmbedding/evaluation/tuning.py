"""Weights of a sum, tuned on train queries: never on those that are evaluated.

Scores of different parts differ in scale, so the grid is laid over shares of each part's spread (the standard
deviation of its scores over the candidates): all shares that add up to 1 in tenths. The best mean nDCG@10 wins; of
equals, what is nearest to equal shares.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import Topics
from FlagEmbedding.indexing.hybrid import HybridRetriever
from FlagEmbedding.retrieval.fusion import Found, candidates
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import Mode, Part

logger = get_logger(__name__)
TENTHS, CUT, SEED = 10, 10, 0


@dataclass(frozen=True)
class Tuned:
    """Weights of a mode, and what they reached on the train queries (nDCG@10, 0 to 1)."""

    weights: dict[Part, float]
    ndcg: float
    queries: int


def check_split(modes: Sequence[Mode], split: str) -> None:
    """Refuse (``UsageError``) to tune where the train queries themselves are evaluated."""
    tuned = [mode.name for mode in modes if mode.fusion == "tuned"]
    if tuned and split == "train":
        raise UsageError(f"--modes {tuned[0]}: weights are tuned on the train queries, so --split train proves nothing")


def tune(
    source: Source, evaluated: Topics, retriever: HybridRetriever, modes: Sequence[Mode], top_k: int, most: int
) -> dict[Mode, Tuned]:
    """The weights of each of ``modes``.

    Args:
        source: the collection.
        evaluated: queries that must not take part.
        most: train queries to draw.

    Raises:
        DataError: there are no train queries.
    """
    train = replace(source, split="train")
    texts = set(evaluated.values())
    qrels = train.qrels()
    judged = {qid: text for qid, text in train.topics().items() if qid in qrels and text not in texts}
    chosen = sorted(random.Random(SEED).sample(sorted(judged), min(most, len(judged))))
    if not chosen:
        raise DataError(f"{source.lang}: no judged train queries to tune weights by; give -rrf in place of -tuned")
    found = retriever.find([judged[qid] for qid in chosen], modes, top_k)
    grades = [_grades(qrels[qid], own, retriever.folders.docids) for qid, own in zip(chosen, found, strict=True)]
    ideal = np.array([_gain(np.sort([max(g, 0) for g in qrels[qid].values()])[::-1]) for qid in chosen])
    tuned = {}
    for mode in modes:
        tuned[mode] = _best(mode, found, grades, ideal, retriever, top_k)
        said = " ".join(f"{part} {weight:.3g}" for part, weight in tuned[mode].weights.items())
        logger.info(
            "%s: %s by %d train queries: %s (nDCG@10 %.1f)", source.lang, mode.name, len(chosen), said,
            100 * tuned[mode].ndcg,
        )  # fmt: skip
    return tuned


def _best(
    mode: Mode, found: Sequence[Found], grades: Sequence[np.ndarray], ideal: np.ndarray, retriever: HybridRetriever,
    top_k: int,
) -> Tuned:  # fmt: skip
    tables, own_grades = [], []
    for own, own_grade in zip(found, grades, strict=True):
        rows = candidates(mode, own.ranked, retriever.how, top_k)
        tables.append(np.stack([own.of(part, rows) for part in mode.parts]))  # [parts, rows]
        own_grades.append(own_grade[np.searchsorted(own.rows, rows)])
    spread = np.concatenate(tables, axis=1).std(axis=1)
    spread[spread == 0] = 1.0

    def reached(shares: np.ndarray) -> float:
        weights = shares / spread
        gains = [
            _gain(grade[np.argsort(-(weights @ table), kind="stable")[:CUT]])
            for table, grade in zip(tables, own_grades, strict=True)
        ]
        return float(np.mean(np.divide(gains, ideal, out=np.zeros(len(ideal)), where=ideal > 0)))

    count = len(mode.parts)
    grid = [np.array(own) / TENTHS for own in product(range(TENTHS + 1), repeat=count) if sum(own) == TENTHS]
    grid.sort(key=lambda shares: (float(((shares - 1 / count) ** 2).sum()), tuple(-shares)))
    ndcg, shares = max(((reached(shares), shares) for shares in grid), key=lambda each: each[0])  # the first of equals
    weights = shares / spread / (shares / spread).sum()
    return Tuned(dict(zip(mode.parts, weights.tolist(), strict=True)), ndcg, len(found))


def _grades(judged: dict[str, int], found: Found, docids: Sequence[str]) -> np.ndarray:
    return np.array([max(judged.get(docids[row], 0), 0) for row in found.rows], dtype=np.float64)


def _gain(grades: np.ndarray) -> float:
    """DCG@10 with trec_eval's linear gain."""
    first = grades[:CUT]
    return float((first / np.log2(np.arange(2, len(first) + 2))).sum())
