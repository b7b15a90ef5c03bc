"""Exact top-k over an index on disk: read block by block with a running top-k, so it may be larger than memory.

Order of hits: score rounded to 6 decimals (what a run file shows), highest first; equal scores by docid, highest
first, which is the order trec_eval gives ties. The rank column therefore is the order that is evaluated. A matrix
product's last bits depend on block size, threads and device; so whatever comes within rounding of the last place is
kept, and the kept passages are scored again in double precision before they are ranked and cut. A run repeats, and
passages with equal vectors get equal scores.

The block scores are one matrix product, on CPU or GPU alike; no faiss-gpu is needed for it. Approximate search
(``approximate.py``) is faiss's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from FlagEmbedding.retrieval.memory import VectorTable
from FlagEmbedding.utils.background import prefetch
from FlagEmbedding.utils.errors import DataError, UsageError

_MICRO = 1_000_000
_SCORE_BYTES = 64 << 20
_RESCORED_PAIRS = 8_192
# float32 inner products of unit vectors are off by less than this; longer vectors scale it.
_ROUNDING = 2e-6


@dataclass(frozen=True)
class Hit:
    """One line of a run: ``score`` is rounded to 6 decimals, ``row`` is the passage's place in the index."""

    docid: str
    score: float
    row: int


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use ``count`` threads for matrix products inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def search(
    index: VectorTable,
    queries: np.ndarray,
    top_k: int,
    *,
    threads: int = 1,
    device: str | torch.device = "cpu",
    block_rows: int | None = None,
) -> list[list[Hit]]:
    """The ``top_k`` passages of greatest inner product for each query, exactly.

    Args:
        queries: ``[Q, dimension]`` float32.
        top_k: hits per query; fewer where the index holds fewer.
        threads: CPU threads of the matrix product.
        device: where the products run ('cpu', 'cuda:0').
        block_rows: vectors read at a time; None: about 32 MiB of them.

    Returns:
        One list per query, in the order described at the top of this file.
    """
    check_queries(index, queries, top_k)
    rows = block_rows or max(1, min(index.rows, (32 << 20) // (4 * index.dimension)))
    running = [_TopK(top_k) for _ in range(len(queries))]
    q = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)
    # The score matrix of a block is bounded too: many queries are taken in turns.
    step = max(1, _SCORE_BYTES // (4 * rows))
    with torch_threads(threads), torch.inference_mode():
        for start, block in prefetch(index.blocks(rows), 1):
            vectors = torch.from_numpy(block).to(device)
            for first in range(0, len(queries), step):
                _update(running[first : first + step], q[first : first + step] @ vectors.T, start)
    _score_again(index, queries, running)
    return [top.hits(index.docids) for top in running]


def check_queries(index: VectorTable, queries: np.ndarray, top_k: int) -> None:
    """Refuse queries that cannot be searched for."""
    if top_k < 1:
        raise UsageError(f"--hits must be at least 1, got {top_k}")
    if queries.ndim != 2 or queries.shape[1] != index.dimension:
        raise UsageError(
            f"{index.folder} holds vectors of {index.dimension}, the queries are {list(queries.shape)}: the index was "
            "made by another encoder"
        )
    if not np.isfinite(queries).all():
        raise DataError("a query vector is not finite; encode in another --dtype")


def _update(running: list[_TopK], scores: torch.Tensor, start: int) -> None:
    """Offer a block's scores ``[Q, n]`` to the running lists."""
    top_k = min(running[0].size, scores.shape[1])
    values, places = torch.topk(scores, top_k, dim=1, sorted=False)
    tied = np.zeros(len(running), dtype=bool)
    if top_k < scores.shape[1]:
        # topk cuts through a tie where it likes; such queries are few and are looked at in full.
        last = values.min(dim=1, keepdim=True).values
        least = last - _ROUNDING * last.abs().clamp(min=1.0)
        tied = ((scores >= least).sum(dim=1) > top_k).cpu().numpy()
    host_values, host_places = values.cpu().numpy(), places.cpu().numpy()
    for query, top in enumerate(running):
        if tied[query]:
            chosen = (scores[query] >= least[query]).nonzero()[:, 0]
            top.offer(scores[query, chosen].cpu().numpy(), chosen.cpu().numpy() + start)
        else:
            top.offer(host_values[query], host_places[query] + start)


class _TopK:
    """The best rows so far, with everything that is within rounding of the last of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.scores: np.ndarray = np.empty(0, dtype=np.float64)
        self.rows = np.empty(0, dtype=np.int64)

    def offer(self, scores: np.ndarray, rows: np.ndarray) -> None:
        scores, rows = np.concatenate([self.scores, scores]), np.concatenate([self.rows, rows])
        if len(scores) > self.size:
            last = np.partition(scores, -self.size)[-self.size]
            keep = scores >= last - _ROUNDING * max(1.0, abs(last))
            scores, rows = scores[keep], rows[keep]
        self.scores, self.rows = scores, rows

    def hits(self, docids: Sequence[str]) -> list[Hit]:
        micros = np.rint(self.scores * _MICRO).astype(np.int64)
        found = [(int(micro), docids[int(row)], int(row)) for micro, row in zip(micros, self.rows, strict=True)]
        found.sort(reverse=True)
        return [Hit(docid, micro / _MICRO, row) for micro, docid, row in found[: self.size]]


def _score_again(index: VectorTable, queries: np.ndarray, running: list[_TopK]) -> None:
    """Replace the kept scores by inner products in double precision; rows are read in the order they lie on disk."""
    query_of = np.concatenate([np.full(len(top.rows), query) for query, top in enumerate(running)])
    rows = np.concatenate([top.rows for top in running])
    scores, order = np.empty(len(rows)), np.argsort(rows, kind="stable")
    for start in range(0, len(order), _RESCORED_PAIRS):
        pairs = order[start : start + _RESCORED_PAIRS]
        distinct, which = np.unique(rows[pairs], return_inverse=True)
        vectors = index.read_rows(distinct).astype(np.float64)
        scores[pairs] = np.einsum("nd,nd->n", vectors[which], queries[query_of[pairs]].astype(np.float64))
    ends = np.cumsum([len(top.rows) for top in running])
    for top, own in zip(running, np.split(scores, ends[:-1]), strict=True):
        top.scores = own


def score_candidates(
    index: VectorTable, queries: np.ndarray, candidates: Sequence[np.ndarray], top_k: int
) -> list[list[Hit]]:
    """The ``top_k`` best of each query's candidate rows, found by other means, by the vectors of ``index``.

    Args:
        queries: ``[Q, dimension]`` float32.
        candidates: Q arrays of distinct rows.
    """
    running = [_TopK(top_k) for _ in candidates]
    for top, rows in zip(running, candidates, strict=True):
        top.rows = rows
    _score_again(index, queries, running)
    return [top.hits(index.docids) for top in running]


def rank(docids: Sequence[str], scores: np.ndarray, rows: np.ndarray, top_k: int) -> list[Hit]:
    """Hits in the order above out of candidates found by other means; a row of −1 is an empty place (faiss)."""
    top = _TopK(top_k)
    real = rows >= 0
    top.offer(scores[real], rows[real])
    return top.hits(docids)
