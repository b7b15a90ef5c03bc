"""Late interaction (MaxSim): the mean over a query's vectors of the greatest inner product with a passage's vectors.

``s(q, p) = (1 / Lq) · Σ_a max_b q_a · p_b`` (Khattab and Zaharia 2020; the mean is BGE-M3's, as ``compute_score``).
Scores are computed in double precision, so that they depend on no block, thread or device; the exact search of a whole
collection looks for its candidates in single precision first.

Shape legend: Lq, Lp vectors of a query and a passage, Dc their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from FlagEmbedding.retrieval.ragged import RaggedTable
from FlagEmbedding.retrieval.searcher import Hit, rank, torch_threads
from FlagEmbedding.utils.errors import DataError, UsageError

Chunk = tuple[np.ndarray, list[np.ndarray]]  # rows, and the vectors [Lp, Dc] of each
Read = Callable[[np.ndarray], Iterable[Chunk]]  # rows, ascending -> their vectors, in order
_CHUNK_VECTORS = 16_384
_SCORE_BYTES = 64 << 20
_ROUNDING = 1e-5  # more than single precision is off by, for unit vectors


class VectorRows(Protocol):
    """Vectors of passages by row: ``RaggedTable`` on disk, or in memory."""

    @property
    def offsets(self) -> np.ndarray: ...

    def vectors(self, row: int) -> np.ndarray: ...


def stored_vectors(table: VectorRows) -> Read:
    """Reads rows of a collection's colbert vectors, a few thousand vectors at a time."""

    def read(rows: np.ndarray) -> Iterator[Chunk]:
        ends = np.cumsum(table.offsets[rows + 1] - table.offsets[rows])
        for own in np.split(rows, np.flatnonzero(np.diff(ends // _CHUNK_VECTORS)) + 1) if len(rows) else ():
            yield own, [table.vectors(row) for row in own]

    return read


def rerank(
    queries: Sequence[np.ndarray], candidates: Sequence[np.ndarray], read: Read, *, threads: int = 1,
    device: str | torch.device = "cpu",
) -> list[np.ndarray]:  # fmt: skip
    """The score of each query with each of its candidate rows, float64, in their order.

    Args:
        queries: ``[Lq, Dc]`` float32 each.
        candidates: rows of the collection for each query.
        read: called once, with all rows that any query wants.
    """
    counts = [len(rows) for rows in candidates]
    scores = np.zeros(sum(counts))
    if not len(scores):
        return [np.empty(0) for _ in candidates]
    rows, owner = np.concatenate(candidates), np.repeat(np.arange(len(candidates)), counts)
    order = np.argsort(rows, kind="stable")
    distinct, first = np.unique(rows[order], return_index=True)
    ends, done = np.append(first[1:], len(order)), 0
    with torch_threads(threads):
        for chunk, vectors in read(distinct):
            for place in range(len(chunk)):
                if distinct[done + place] != chunk[place]:
                    raise DataError("the vectors of other passages came than were asked for")
            pairs = order[first[done] : ends[done + len(chunk) - 1]]
            local = np.searchsorted(chunk, rows[pairs])
            for query in np.unique(owner[pairs]).tolist():
                own = owner[pairs] == query
                scores[pairs[own]] = maxsim(queries[query], [vectors[i] for i in local[own].tolist()], device=device)
            done += len(chunk)
    if done != len(distinct):
        raise DataError(f"the vectors of {done} passages came where {len(distinct)} were asked for")
    return np.split(scores, np.cumsum(counts)[:-1])


def maxsim(
    query: np.ndarray, passages: Sequence[np.ndarray], dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> np.ndarray:  # fmt: skip
    """The score of ``query [Lq, Dc]`` with each passage ``[Lp, Dc]``; 0 where either has no vector."""
    scores, lengths = np.zeros(len(passages)), np.array([len(each) for each in passages], dtype=np.int64)
    there = np.flatnonzero(lengths)
    if not len(query) or not len(there):
        return scores
    together = torch.from_numpy(np.concatenate([passages[i] for i in there.tolist()])).to(device, dtype)
    products = (torch.from_numpy(query).to(device, dtype) @ together.T).cpu().numpy()
    starts = np.concatenate([[0], np.cumsum(lengths[there])[:-1]])
    scores[there] = np.maximum.reduceat(products, starts, axis=1).mean(axis=0)
    return scores


def search_maxsim(
    table: RaggedTable, queries: Sequence[np.ndarray], top_k: int, *, threads: int = 1,
    device: str | torch.device = "cpu",
) -> list[list[Hit]]:  # fmt: skip
    """The ``top_k`` passages of greatest score for each query out of all: every vector meets every query's."""
    if top_k < 1:
        raise UsageError(f"--hits must be at least 1, got {top_k}")
    found: list[list[Hit]] = []
    step = max(1, _SCORE_BYTES // (4 * max(1, table.rows)))
    read = stored_vectors(table)
    for start in range(0, len(queries), step):
        own = queries[start : start + step]
        scores = np.zeros((len(own), table.rows), dtype=np.float32)
        with torch_threads(threads):
            for rows, vectors in read(np.arange(table.rows)):
                for place, query in enumerate(own):
                    scores[place, rows] = maxsim(query, vectors, torch.float32, device)
        size = min(top_k, table.rows)
        last = np.partition(scores, -size, axis=1)[:, -size] if size else np.zeros(len(own))
        margins = _ROUNDING * np.maximum(1, np.abs(last))
        near = [np.flatnonzero(each >= least) for each, least in zip(scores, last - margins, strict=True)]
        exact = rerank(own, near, read, threads=threads, device=device)
        found += [rank(table.docids, *each, top_k) for each in zip(exact, near, strict=True)]
    return found
