"""Exact search by words: lexical weights or BM25 over an inverted index on disk.

The index is the matrix passages x tokens by columns (CSC): of each token the passages that hold it, with its weight.
A query adds up its tokens' columns, so the work is that of their postings and not of the corpus. BM25 is the same
search over other weights, computed when the index is made (as bm25s does, Lù 2024, arXiv 2407.03618):

    idf(t) · tf / (tf + k1 · (1 − b + b · length / mean length)),   idf(t) = ln(1 + (N − df + 0.5) / (df + 0.5))

with k1 0.9 and b 0.4, Pyserini's for MIRACL; a query counts its tokens. Order and rounding of hits are the searcher's.

Shape legend: N passages, V tokens of the vocabulary, T entries of all passages.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from FlagEmbedding.retrieval.ragged import RaggedTable
from FlagEmbedding.retrieval.searcher import Hit, rank
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.io import atomic_open, remove_leftovers, sha256_file

STARTS, ROWS, IMPACTS = "postings.offsets", "postings.rows", "postings.weights"
K1, B = 0.9, 0.4
_BLOCK = 1 << 22  # entries that are sorted together
Query = tuple[np.ndarray, np.ndarray]  # token ids, weights
Impact = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # ids, weights, rows -> what is stored


@dataclass(frozen=True)
class Postings:
    """An inverted index.

    Attributes:
        docids: of the N passages.
        starts: ``[V + 1]`` int64; token t has the postings ``starts[t]`` to ``starts[t + 1]``.
        rows: ``[T]`` int32, ascending for each token.
        weights: ``[T]`` float32.
    """

    docids: Sequence[str]
    starts: np.ndarray
    rows: np.ndarray
    weights: np.ndarray

    @classmethod
    def open(cls, table: RaggedTable) -> Postings:
        """Of a folder; its files are checked against the manifest. Raises ``DataError``."""
        for name in (STARTS, ROWS, IMPACTS):
            if name not in table.arrays or sha256_file(table.folder / name) != table.manifest["files"][name]["sha256"]:
                raise table.changed(name)
        return cls(table.docids, *(table.arrays[name] for name in (STARTS, ROWS, IMPACTS)))

    def scores(self, query: Query) -> np.ndarray:
        """Of every passage for a query, ``[N]`` float64: ``Σ_t w_q(t) · w_p(t)``."""
        rows, values = [np.empty(0, dtype=np.int32)], [np.empty(0)]
        for token, weight in zip(*query, strict=True):
            if token + 1 < len(self.starts):
                span = slice(self.starts[token], self.starts[token + 1])
                rows.append(self.rows[span])
                values.append(self.weights[span] * np.float64(weight))
        # One pass in C over all postings: half the time of adding token by token.
        return np.bincount(np.concatenate(rows), np.concatenate(values), minlength=len(self.docids))


def best(docids: Sequence[str], scores: np.ndarray, top_k: int) -> list[Hit]:
    """The ``top_k`` best of the passages that score above 0, out of ``scores [N]``."""
    rows = np.flatnonzero(scores > 0)
    return rank(docids, scores[rows], rows, top_k)


def write_postings(
    folder: Path, offsets: np.ndarray, ids: np.ndarray, weights: np.ndarray, impact: Impact | None = None
) -> dict[str, dict[str, object]]:
    """The inverted index of a CSR matrix into ``folder``; returns what the manifest says of its files.

    Memory: one block of entries and a number per token; the files are written through a map of the disk.
    """
    vocabulary = 1 + max((int(ids[i : i + _BLOCK].max()) for i in range(0, len(ids), _BLOCK)), default=-1)
    counts = _token_counts(ids, vocabulary)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
    cursor = starts[:-1].copy()
    described: dict[str, tuple[str, int]] = {STARTS: ("<i8", vocabulary + 1)}
    described |= {ROWS: ("<i4", len(ids)), IMPACTS: ("<f4", len(ids))}
    for name in described:
        remove_leftovers(folder, name)
    with clear_disk_errors(f"writing the inverted index to {folder}"):
        with atomic_open(folder / STARTS, "wb") as stream:
            stream.write(starts.tobytes())
        with atomic_open(folder / ROWS, "wb") as one, atomic_open(folder / IMPACTS, "wb") as other:
            if len(ids):
                for stream in (one, other):
                    stream.truncate(4 * len(ids))
                with mmap.mmap(one.fileno(), 0) as first, mmap.mmap(other.fileno(), 0) as second:
                    _scatter(first, second, cursor, offsets, ids, weights, impact)
        return {
            name: {"sha256": sha256_file(folder / name), "dtype": dtype, "shape": [size]}
            for name, (dtype, size) in described.items()
        }


def _token_counts(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(ids), _BLOCK):
        counts += np.bincount(ids[start : start + _BLOCK], minlength=vocabulary)
    return counts


def _rows_of(offsets: np.ndarray, start: int, count: int) -> np.ndarray:
    """The row of each of ``count`` entries from ``start`` on."""
    return np.searchsorted(offsets, np.arange(start, start + count), side="right") - 1


def _scatter(
    first: mmap.mmap, second: mmap.mmap, cursor: np.ndarray, offsets: np.ndarray, ids: np.ndarray,
    weights: np.ndarray, impact: Impact | None,
) -> None:  # fmt: skip
    """Each block of entries, sorted by token, behind what earlier blocks wrote of the same tokens."""
    rows, values = np.frombuffer(first, dtype="<i4"), np.frombuffer(second, dtype="<f4")
    try:
        for start in range(0, len(ids), _BLOCK):
            own = np.asarray(ids[start : start + _BLOCK])
            of_rows = _rows_of(offsets, start, len(own))
            here = np.asarray(weights[start : start + _BLOCK])
            here = here if impact is None else impact(own, here, of_rows)
            order = np.argsort(own, kind="stable")
            tokens, counts = np.unique(own, return_counts=True)
            within = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
            places = np.repeat(cursor[tokens], counts) + within
            rows[places], values[places] = of_rows[order], here[order]
            cursor[tokens] += counts
    finally:
        del rows, values  # a map cannot be closed while arrays look into it


def bm25_impact(offsets: np.ndarray, ids: np.ndarray, weights: np.ndarray, k1: float = K1, b: float = B) -> Impact:
    """BM25's weight of a token in a passage; see the top of this file. ``weights`` are the counts of tokens."""
    rows = len(offsets) - 1
    vocabulary = 1 + int(ids.max()) if len(ids) else 0
    frequency = _token_counts(ids, vocabulary)
    idf = np.log(1 + (rows - frequency + 0.5) / (frequency + 0.5))
    lengths = np.zeros(rows)
    for start in range(0, len(ids), _BLOCK):
        here = np.asarray(weights[start : start + _BLOCK])
        of_rows = _rows_of(offsets, start, len(here))
        summed = np.bincount(of_rows - of_rows[0], here)
        lengths[of_rows[0] : of_rows[0] + len(summed)] += summed
    share = 1 - b + b * lengths / max(lengths.mean(), 1e-9) if rows else lengths

    def impact(own: np.ndarray, counts: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
        weights: np.ndarray = idf[own] * counts / (counts + k1 * share[of_rows])
        return weights

    return impact


def postings_in_memory(docids: Sequence[str], lengths: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Postings:
    """An inverted index of rows that lie in memory: entries of each row, and the entries end to end."""
    order = np.argsort(ids, kind="stable")
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    vocabulary = 1 + int(ids.max(initial=-1))
    starts = np.concatenate([[0], np.cumsum(_token_counts(ids, vocabulary))])
    return Postings(docids, starts, rows[order], weights[order])
