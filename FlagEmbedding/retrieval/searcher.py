"""Exact top-k over an index on disk: read block by block with a running top-k, so it may be larger than memory.

Order of hits: score rounded to 6 decimals (what a run file shows), highest first; equal scores by docid, highest
first, which is the order trec_eval gives ties. The rank column therefore is the order that is evaluated, a run
repeats whatever the block size, and passages with equal vectors do not change places with the last bits of a sum.
Every passage tied with the last hit takes part in that order before the list is cut.

The block scores are one matrix product, on CPU or GPU alike; no faiss-gpu is needed for it. Approximate search
(``approximate.py``) is faiss's.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from FlagEmbedding.retrieval.index import DocIds, FlatIndex
from FlagEmbedding.utils.errors import DataError, UsageError

_MICRO = 1_000_000
_SCORE_BYTES = 256 << 20


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
    index: FlatIndex,
    queries: np.ndarray,
    top_k: int,
    *,
    threads: int = 1,
    device: str | torch.device = "cpu",
    block_rows: int | None = None,
) -> list[list[Hit]]:
    """The ``top_k`` passages of greatest inner product for each query, exactly.

    :param queries: ``[Q, dimension]`` float32.
    :param top_k: hits a query; fewer where the index holds fewer.
    :param threads: CPU threads of the matrix product.
    :param device: where the products run ('cpu', 'cuda:0').
    :param block_rows: vectors read at a time; None: about 64 MiB of them.
    :returns: one list a query, in the order described at the top of this file.
    """
    check_queries(index, queries, top_k)
    rows = block_rows or max(1, min(index.rows, (64 << 20) // (4 * index.dimension)))
    running = [_TopK(top_k) for _ in range(len(queries))]
    q = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)
    # The score matrix of a block is bounded too: many queries are taken in turns.
    step = max(1, _SCORE_BYTES // (4 * rows))
    with torch_threads(threads), torch.inference_mode():
        for start, block in _ahead(index.blocks(rows)):
            vectors = torch.from_numpy(block).to(device)
            for first in range(0, len(queries), step):
                _update(running[first : first + step], q[first : first + step] @ vectors.T, start)
    return [top.hits(index.docids) for top in running]


def check_queries(index: FlatIndex, queries: np.ndarray, top_k: int) -> None:
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


def _ahead(blocks: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Read the next block while the current one is searched."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = pool.submit(next, blocks, None)
            yield block


def _update(running: list[_TopK], scores: torch.Tensor, start: int) -> None:
    """Offer a block's scores ``[Q, n]`` to the running lists."""
    top_k = min(running[0].size, scores.shape[1])
    values, places = torch.topk(scores, top_k, dim=1, sorted=False)
    if top_k < scores.shape[1]:
        # topk cuts through a tie where it likes; such queries are few and are looked at in full.
        least = values.min(dim=1).values[:, None] - 1.0 / _MICRO
        tied = ((scores >= least).sum(dim=1) > top_k).cpu().numpy()
    else:
        least, tied = values[:, :1], np.zeros(len(running), dtype=bool)
    host_values, host_places = values.cpu().numpy(), places.cpu().numpy()
    for query, top in enumerate(running):
        if tied[query]:
            chosen = (scores[query] >= least[query]).nonzero()[:, 0]
            top.offer(scores[query, chosen].cpu().numpy(), chosen.cpu().numpy() + start)
        else:
            top.offer(host_values[query], host_places[query] + start)


class _TopK:
    """The best rows so far, with everything tied with the last of them; scores in whole millionths."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.micros = np.empty(0, dtype=np.int64)
        self.rows = np.empty(0, dtype=np.int64)

    def offer(self, scores: np.ndarray, rows: np.ndarray) -> None:
        micros = np.concatenate([self.micros, np.rint(scores.astype(np.float64) * _MICRO).astype(np.int64)])
        rows = np.concatenate([self.rows, rows])
        if len(micros) > self.size:
            keep = micros >= np.partition(micros, -self.size)[-self.size]
            micros, rows = micros[keep], rows[keep]
        self.micros, self.rows = micros, rows

    def hits(self, docids: DocIds) -> list[Hit]:
        found = [(int(micro), docids[int(row)], int(row)) for micro, row in zip(self.micros, self.rows, strict=True)]
        found.sort(reverse=True)
        return [Hit(docid, micro / _MICRO, row) for micro, docid, row in found[: self.size]]


def rank(docids: DocIds, scores: np.ndarray, rows: np.ndarray, top_k: int) -> list[Hit]:
    """Hits in the order above out of candidates found by other means; a row of −1 is an empty place (faiss)."""
    top = _TopK(top_k)
    real = rows >= 0
    top.offer(scores[real], rows[real])
    return top.hits(docids)
