"""Approximate search by any faiss ``index_factory`` string (HNSW32, IVF1024,Flat, IVF256,PQ16, SQ8 …).

Built from the flat index block by block, kept beside it as ``index.{type}`` with the flat file's checksum, and
built again when that changes. Training vectors are a seeded sample, so building repeats. Such an index lives in
memory while it is searched; the exact search in ``searcher.py`` does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.searcher import Hit, check_queries, rank
from FlagEmbedding.retrieval.shards import clear_disk_errors, remove_leftovers
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import made_by
from FlagEmbedding.utils.io import atomic_open, read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
_TRAIN_ROWS = 262_144
_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class SearchEffort:
    """How hard to look: ``n_probe`` lists of an IVF index, ``ef_search`` candidates of an HNSW one."""

    n_probe: int = 32
    ef_search: int = 128


def search_approximate(
    index: FlatIndex,
    queries: np.ndarray,
    top_k: int,
    index_type: str,
    *,
    threads: int = 1,
    effort: SearchEffort | None = None,
) -> tuple[list[list[Hit]], float]:
    """Hits as of :func:`FlagEmbedding.retrieval.searcher.search`, by the index that ``index_type`` describes, and the
    seconds that the search took (loading and building not counted).

    Runs on the GPUs where faiss-gpu is installed and sees one. Raises ``UsageError`` for a type that faiss
    does not know or that does not fit the dimension.
    """
    import faiss

    check_queries(index, queries, top_k)
    faiss.omp_set_num_threads(max(1, threads))
    approximate = load_or_build(index, index_type)
    _set_effort(approximate, effort or SearchEffort(), top_k)
    if hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0:
        approximate = faiss.index_cpu_to_all_gpus(approximate)
    started = time.perf_counter()
    scores, rows = approximate.search(np.ascontiguousarray(queries, dtype=np.float32), min(top_k, index.rows))
    hits = [rank(index.docids, s, r, top_k) for s, r in zip(scores, rows, strict=True)]
    return hits, time.perf_counter() - started


def load_or_build(index: FlatIndex, index_type: str) -> Any:
    """The faiss index of ``index_type`` over ``index``, from disk where an earlier run left it.

    Raises:
        UsageError: faiss cannot build it, or a file of its name is somebody else's.
    """
    import faiss

    path = index.folder / f"index.{index_type.replace('/', '_')}"
    record, identity = path.with_name(f"{path.name}.json"), {"index_type": index_type, "index_sha256": index.checksum()}
    if path.exists() and made_by(record, identity):
        return faiss.read_index(str(path))
    for there in (path, record):
        if there.exists() and not _is_ours(record):
            raise UsageError(f"{there} was not written by this program: move it away, or leave --index_type out")
    approximate = build(index, index_type)
    with clear_disk_errors(f"writing {path}"):
        write_json_atomic(record, {**identity, "index_sha256": None})  # ours, and not finished
        with atomic_open(path, "wb") as stream:
            faiss.write_index(approximate, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
        write_json_atomic(record, identity)
    return approximate


def _is_ours(record: Path) -> bool:
    try:
        found = read_json(record)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() == {"index_type", "index_sha256"}


def build(index: FlatIndex, index_type: str) -> Any:
    """Train (on at most 262,144 vectors, seed 0) and fill an ``index_factory`` index with inner products."""
    import faiss

    try:
        approximate = faiss.index_factory(index.dimension, index_type, faiss.METRIC_INNER_PRODUCT)
        if not approximate.is_trained:
            rows = np.arange(index.rows)
            if index.rows > _TRAIN_ROWS:
                rows = np.sort(np.random.default_rng(0).choice(index.rows, _TRAIN_ROWS, replace=False))
            approximate.train(index.read_rows(rows))
        for _, block in index.blocks(_BLOCK_ROWS):
            approximate.add(block)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"--index_type {index_type}: faiss cannot build it over {index.rows} vectors of {index.dimension}: {reason}"
        ) from error
    logger.info("built %s over %d vectors of %d", index_type, index.rows, index.dimension)
    return approximate


def _set_effort(approximate: Any, effort: SearchEffort, top_k: int) -> None:
    import faiss

    parameters = faiss.ParameterSpace()
    for name, value in (("nprobe", effort.n_probe), ("efSearch", max(effort.ef_search, top_k))):
        try:
            parameters.set_index_parameter(approximate, name, value)
        except RuntimeError:
            continue  # this kind of index has no such knob


def recall(found: list[list[Hit]], exact: list[list[Hit]]) -> float:
    """Share of the exact hits that were found, averaged over queries."""
    shares = [
        len({hit.row for hit in f} & {hit.row for hit in e}) / len(e) for f, e in zip(found, exact, strict=True) if e
    ]
    return float(np.mean(shares)) if shares else 1.0


def remove_approximate(folder: Path) -> None:
    """Remove what approximate searches left in an index folder that is encoded again."""
    for record in filter(_is_ours, folder.glob("index.*.json")):
        remove_leftovers(folder, record.stem)
        record.with_suffix("").unlink(missing_ok=True)
        record.unlink()
