"""Approximate search by smaller vectors (fp16, int8, binary) or any faiss ``index_factory`` string (HNSW32, SQ8 …).

``fp16`` and ``int8`` keep a number of each dimension in 2 bytes or 1, ``binary`` its sign alone, in a bit. Their search
gives candidates, a few times as many as hits are asked for, which are then scored by the float vectors on disk.

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
from FlagEmbedding.retrieval.searcher import Hit, check_queries, rank, score_candidates
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import made_by
from FlagEmbedding.utils.io import atomic_open, read_json, remove_leftovers, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
# Vector types and faiss's name of them; ``binary`` is a class of its own there.
VECTOR_TYPES = {"fp16": "SQfp16", "int8": "SQ8", "binary": ""}
RESCORED = 4  # candidates for each hit that a search by these types takes
_TRAIN_ROWS = 262_144
_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class SearchEffort:
    """How hard to look: ``n_probe`` lists of an IVF index, ``ef_search`` candidates of an HNSW one.

    ``rescore``: so many candidates for each hit are scored again by the float vectors; 0: none; None: ``RESCORED`` for
    the vector types, none for an ``index_factory`` string.
    """

    n_probe: int = 32
    ef_search: int = 128
    rescore: int | None = None

    def candidates(self, index_type: str, top_k: int) -> int:
        """How many candidates to take for ``top_k`` hits and score again; 0: the index's own scores stand."""
        rescore = RESCORED * (index_type in VECTOR_TYPES) if self.rescore is None else self.rescore
        return rescore * top_k


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
    effort = effort or SearchEffort()
    candidates = effort.candidates(index_type, top_k)
    _set_effort(approximate, effort, max(top_k, candidates))
    if index_type != "binary" and hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0:
        approximate = faiss.index_cpu_to_all_gpus(approximate)
    started = time.perf_counter()
    asked = np.ascontiguousarray(queries, dtype=np.float32)
    scores, rows = approximate.search(
        _signs(asked) if index_type == "binary" else asked, min(max(top_k, candidates), index.rows)
    )
    if candidates:
        hits = score_candidates(index, asked, [own[own >= 0] for own in rows], top_k)
    else:
        scores = -scores.astype(np.float64) if index_type == "binary" else scores  # of bits that differ
        hits = [rank(index.docids, s, r, top_k) for s, r in zip(scores, rows, strict=True)]
    return hits, time.perf_counter() - started


def _signs(vectors: np.ndarray) -> np.ndarray:
    """A bit for each dimension, ``[N, D / 8]`` uint8: 1 where it is above 0."""
    return np.packbits(vectors > 0, axis=1)


def load_or_build(index: FlatIndex, index_type: str) -> Any:
    """The faiss index of ``index_type`` over ``index``, from disk where an earlier run left it.

    Raises:
        UsageError: faiss cannot build it, or a file of its name is somebody else's.
    """
    import faiss

    path = index.folder / f"index.{index_type.replace('/', '_')}"
    record, identity = path.with_name(f"{path.name}.json"), {"index_type": index_type, "index_sha256": index.checksum()}
    binary = index_type == "binary"
    if path.exists() and made_by(record, identity):
        try:
            there = faiss.read_index_binary(str(path)) if binary else faiss.read_index(str(path))
            if (there.ntotal, there.d) == (index.rows, index.dimension):
                return there
            reason = f"it holds {there.ntotal} vectors of {there.d}"
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().splitlines()[-1].rpartition("Error: ")[2]
        logger.warning("%s is damaged (%s): building it again", path, reason)
    for found in (path, record):
        if found.exists() and not _is_ours(record):
            raise UsageError(f"{found} was not written by this program: move it away, or leave --index_type out")
    approximate = build(index, index_type)
    with clear_disk_errors(f"writing {path}"):
        write_json_atomic(record, {**identity, "index_sha256": None})  # ours, and not finished
        with atomic_open(path, "wb") as stream:
            write = faiss.write_index_binary if binary else faiss.write_index
            write(approximate, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]
        write_json_atomic(record, identity)
    logger.info(
        "%s takes %.1f MB, the float vectors %.1f MB", path, path.stat().st_size / 1e6, index.path.stat().st_size / 1e6
    )
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
        if index_type == "binary":
            return _build_binary(index)
        factory = VECTOR_TYPES.get(index_type, index_type)
        approximate = faiss.index_factory(index.dimension, factory, faiss.METRIC_INNER_PRODUCT)
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


def _build_binary(index: FlatIndex) -> Any:
    import faiss

    if index.dimension % 8:
        raise RuntimeError("8 signs make a byte, so the dimension must be a multiple of 8")
    binary = faiss.IndexBinaryFlat(index.dimension)
    for _, block in index.blocks(_BLOCK_ROWS):
        binary.add(_signs(block))
    return binary


def _set_effort(approximate: Any, effort: SearchEffort, top_k: int) -> None:
    import faiss

    if isinstance(approximate, faiss.IndexBinary):
        return
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
