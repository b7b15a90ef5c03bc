"""Several entries per passage on disk: lexical weights, token counts, colbert vectors. Written in shards, read by row.

One mode's folder ``{index folder}/{mode}`` is complete in itself:

    manifest.json   identity, rows, entries, and of every file SHA-256, dtype and shape; written last
    docid           one id per line
    offsets         int64 [rows + 1]: row r has the entries ``offsets[r]`` to ``offsets[r + 1]``
    ids, weights    sparse and bm25: int32 and float32 [entries], ids ascending within a row
    vectors, scales colbert: [entries, width] and, where vectors are int8, float32 [entries]

All are raw little-endian arrays (``np.memmap`` opens them). While it is encoded, ``{mode}/shards`` holds files of each
shard by the rules of ``retrieval.shards``: its record comes last, shard i holds the passages it always holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from FlagEmbedding.retrieval.index import DOCID, DocIds, pieces
from FlagEmbedding.retrieval.shards import (
    MANIFEST,
    ShardStore,
    clear_disk_errors,
    read_manifest,
)
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import differences
from FlagEmbedding.utils.io import atomic_open, remove_leftovers
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

OFFSETS, IDS, WEIGHTS, VECTORS, SCALES = "offsets", "ids", "weights", "vectors", "scales"
LENGTHS = "lengths"  # of the rows of a shard
LEXICAL: dict[str, tuple[str, int]] = {IDS: ("<i4", 1), WEIGHTS: ("<f4", 1)}
VECTOR_DTYPES = {"fp32": "<f4", "fp16": "<f2", "int8": "|i1"}
Arrays = Mapping[str, np.ndarray]


def vector_layout(vector_type: str, width: int) -> dict[str, tuple[str, int]]:
    """The arrays of colbert vectors of ``width`` numbers, name -> (dtype, numbers per entry)."""
    scales = {SCALES: ("<f4", 1)} if vector_type == "int8" else {}
    return {VECTORS: (VECTOR_DTYPES[vector_type], width), **scales}


def pack_vectors(vectors: np.ndarray, vector_type: str) -> dict[str, np.ndarray]:
    """``vectors [T, width]`` float32 as they are stored; int8: each vector by its own scale, max(abs) / 127."""
    if vector_type != "int8":
        return {VECTORS: vectors.astype(VECTOR_DTYPES[vector_type])}
    scales = np.abs(vectors).max(axis=1, initial=0.0).astype("<f4") / 127
    steps = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
    return {VECTORS: steps.astype("|i1"), SCALES: scales}


class RaggedStore(ShardStore):
    """The working folder of one mode."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self.layout: dict[str, tuple[str, int]] = {n: (d, w) for n, (d, w) in manifest["layout"].items()}
        self.suffixes = (LENGTHS, *self.layout, "docid")

    def put(self, shard: int, lengths: np.ndarray, arrays: Arrays, docids: Sequence[str]) -> None:
        """Store one shard: entries of each row, the entries end to end, and the rows' docids."""
        start, stop = self.span(shard)
        if not stop - start == len(lengths) == len(docids):
            raise DataError(
                f"shard {shard} of {self.folder}: expected {stop - start} rows, got {len(lengths)} and {len(docids)} "
                "docids; did the corpus change while it was read?"
            )
        files = {name: arrays[name].astype(dtype, copy=False).tobytes() for name, (dtype, _) in self.layout.items()}
        self._put(shard, {LENGTHS: lengths.astype("<i4").tobytes(), **files}, docids)

    def copy(self, shard: int, suffix: str, expected: str, target: IO[bytes], total: Any) -> bytes | None:
        """Append a file of a shard to ``target``, checked; the contents of the short ``lengths`` come back.

        Raises:
            DataError: it is not the file that the record lists; the shard is removed.
        """
        digest, kept = hashlib.sha256(), b""
        for piece in pieces(self, shard, suffix):
            digest.update(piece)
            if suffix == LENGTHS:
                kept += piece
                continue
            total.update(piece)
            target.write(piece)
        if digest.hexdigest() != expected:
            raise self.damaged(shard, f"SHA-256 of its {suffix} file differs")
        return kept if suffix == LENGTHS else None


def assemble_ragged(store: RaggedStore, folder: Path) -> dict[str, Any]:
    """Join the finished shards into ``folder``; returns what the manifest shall say, which the caller completes.

    Memory: one shard's lengths. Raises ``DataError`` for a shard that is missing or damaged.
    """
    names = {LENGTHS: OFFSETS, **{name: name for name in store.layout}, "docid": DOCID}
    digests, entries = {}, 0
    for suffix, name in names.items():  # a file at a time: few are open, and a full disk is met early
        remove_leftovers(folder, name)
        digest, end = hashlib.sha256(), 0
        with clear_disk_errors(f"writing {folder / name}"), atomic_open(folder / name, "wb") as target:
            if suffix == LENGTHS:
                _write_offsets(target, digest, np.zeros(1, dtype=np.int64))
            for shard in range(len(store)):
                lengths = store.copy(shard, suffix, store.digests(shard)[suffix], target, digest)
                if lengths is not None:
                    ends = end + np.cumsum(np.frombuffer(lengths, dtype="<i4"), dtype=np.int64)
                    end = int(ends[-1])
                    _write_offsets(target, digest, ends)
        digests[name] = digest.hexdigest()
        entries = end if suffix == LENGTHS else entries
    described = {OFFSETS: ("<i8", [store.rows + 1]), DOCID: ("text", [store.rows])}
    described |= {n: (d, [entries, w] if n == VECTORS else [entries]) for n, (d, w) in store.layout.items()}
    files = {n: {"sha256": digests[n], "dtype": described[n][0], "shape": described[n][1]} for n in digests}
    return {**store.manifest, "entries": entries, "files": files}


def _write_offsets(target: IO[bytes], digest: Any, values: np.ndarray) -> None:
    content = values.astype("<i8").tobytes()
    target.write(content)
    digest.update(content)


class RaggedTable:
    """A read-only view of a mode's folder; arrays are mapped, not read.

    Attributes:
        offsets: ``[rows + 1]`` int64.
        arrays: every other array by its file's name.

    Raises:
        DataError: a file is missing, or is not of the size that the manifest says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder / MANIFEST)
        if manifest is None:
            mode = self.folder.name
            raise DataError(f"{self.folder}: no manifest; run step0-generate_embedding.py with --modes {mode} first")
        self.manifest, self.identity = manifest, manifest["identity"]
        self.mode: str = self.identity.get("mode", "")
        self.arrays = {name: self._map(name, file) for name, file in manifest["files"].items() if name != DOCID}
        self.offsets = self.arrays.pop(OFFSETS)
        self.docids = DocIds(self.folder / DOCID)
        if self.docids.sha256 != manifest["files"][DOCID]["sha256"] or len(self.docids) != self.rows:
            raise self.changed(DOCID)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def _map(self, name: str, file: Mapping[str, Any]) -> np.ndarray:
        path, dtype, shape = self.folder / name, np.dtype(str(file["dtype"])), tuple(file["shape"])
        size = int(np.prod(shape)) * dtype.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise self.changed(name)
        return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)

    def changed(self, name: str) -> DataError:
        """For a file that is not what was written."""
        return DataError(
            f"{self.folder / name} is not the file that {MANIFEST} beside it lists: changed, damaged or missing; run "
            f"step0 with --modes {self.folder.name} --overwrite True"
        )

    def check_encoder(self, description: Mapping[str, Any], hint: str) -> None:
        """Refuse this folder where another model made it; see :meth:`FlatIndex.check_encoder`."""
        keys = ("model", "normalize_embeddings") if self.mode == "colbert" else ("model",)
        differing = differences({k: self.identity.get(k) for k in keys}, {k: description.get(k) for k in keys})
        if differing:
            raise UsageError(f"{self.folder} was made by another encoder ({'; '.join(differing)}): {hint}")

    def row(self, row: int) -> dict[str, np.ndarray]:
        """The entries of one row, each array by name."""
        start, stop = self.offsets[row], self.offsets[row + 1]
        return {name: array[start:stop] for name, array in self.arrays.items() if "." not in name}

    def vectors(self, row: int) -> np.ndarray:
        """Colbert vectors ``[tokens, width]`` float32 of one row."""
        return unpacked(self.row(row))


def unpacked(entries: Arrays) -> np.ndarray:
    """Stored vectors as float32, scales applied."""
    vectors = np.asarray(entries[VECTORS]).astype(np.float32)
    return vectors * np.asarray(entries[SCALES])[:, None] if SCALES in entries else vectors
