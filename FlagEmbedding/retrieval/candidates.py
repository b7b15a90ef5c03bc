"""From what each part can search to the candidates of several modes, each scored by every part that takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from FlagEmbedding.retrieval.fusion import Found, Fusing, candidates
from FlagEmbedding.retrieval.lexical import best
from FlagEmbedding.retrieval.searcher import Hit
from FlagEmbedding.utils.modes import Mode, Part, parts_of


@dataclass(frozen=True)
class Asked:
    """Some queries on one collection, wherever its vectors lie; a part that is not asked needs nothing here.

    Attributes:
        docids: of the passages.
        queries: how many.
        dense: a depth -> the hits of each query.
        dense_scores: a query's number and rows -> their dense scores.
        lexical: of sparse and bm25: a query's number -> the scores of all passages.
        late: a depth -> hits of each query by colbert over the whole collection.
        rerank: rows for each query -> their colbert scores.
    """

    docids: Sequence[str]
    queries: int
    dense: Callable[[int], list[list[Hit]]]
    dense_scores: Callable[[int, list[int]], Sequence[float]]
    lexical: Mapping[Part, Callable[[int], np.ndarray]]
    late: Callable[[int], list[list[Hit]]]
    rerank: Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def find(asked: Asked, modes: Sequence[Mode], how: Fusing, top_k: int) -> list[Found]:
    """Candidates of every query for ``modes``, scores rounded to 6 decimals as the searcher's are.

    What a mode gets does not depend on the modes beside it.
    """
    parts, deepest = parts_of(modes), max(how.depth(mode, top_k) for mode in modes)
    searching: set[Part] = {part for mode in modes for part in how.searching(mode)}
    ranked: list[dict[Part, np.ndarray]] = [{} for _ in range(asked.queries)]
    for part in ("dense", "colbert"):
        if part in searching:
            hits = asked.dense(deepest) if part == "dense" else asked.late(deepest)
            for own, found in zip(ranked, hits, strict=True):
                own[part] = _rows(found)
    results, reranked = [], []
    for query, own in enumerate(ranked):
        whole = {part: scores(query) for part, scores in asked.lexical.items()}
        for part in searching & whole.keys():
            own[part] = _rows(best(asked.docids, whole[part], deepest))
        each = [candidates(mode, own, how, top_k) for mode in modes]
        rows = np.unique(np.concatenate(each))
        scores: dict[Part, np.ndarray] = {part: np.round(whole[part][rows], 6) for part in whole if part in parts}
        if "dense" in parts:
            scores["dense"] = np.asarray(asked.dense_scores(query, rows.tolist()))
        late = [taken for taken, mode in zip(each, modes, strict=True) if "colbert" in mode.parts]
        reranked.append(np.unique(np.concatenate(late)) if late else np.empty(0, np.int64))
        results.append(Found(own, rows, scores))
    if "colbert" not in parts:
        return results
    return [_with_colbert(*each) for each in zip(results, reranked, asked.rerank(reranked), strict=True)]


def _rows(hits: Sequence[Hit]) -> np.ndarray:
    return np.array([hit.row for hit in hits], dtype=np.int64)


def _with_colbert(found: Found, rows: np.ndarray, scores: np.ndarray) -> Found:
    """``found`` with colbert's scores; what no mode with colbert wants has none (NaN, which nobody reads)."""
    late = np.full(len(found.rows), np.nan)
    late[np.searchsorted(found.rows, rows)] = np.round(scores, 6)
    return Found(found.ranked, found.rows, {**found.scores, "colbert": late})
