"""The index folder ``{index_save_dir}/{name}/{lang}``: a faiss file, its docids, and a manifest that says what it is.

    index          a faiss IndexFlatIP, byte for byte what ``faiss.write_index`` writes
    docid          one id per line, in the vectors' order; with ``index`` this is what pyserini's FaissSearcher opens
    manifest.json  identity (model hash, arguments, corpus), counts, checksums, provenance

The faiss file is written straight from the shards, a mebibyte at a time, so neither writing nor searching ever
holds the vectors in memory. Layout of an IndexFlatIP (faiss, ``impl/index_write.cpp``): fourcc ``IxFI``, dimension
int32, rows int64, two unused int64 (1 << 20), trained uint8, metric int32 (0 = inner product), then the number of
floats as uint64 and the floats. faiss itself opens each finished file before the manifest calls it done.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, clear_disk_errors, read_manifest
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.folders import remove_named
from FlagEmbedding.utils.identity import differences
from FlagEmbedding.utils.io import atomic_open, remove_leftovers, sha256_file, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

INDEX, DOCID = "index", "docid"
_HEADER = struct.Struct("<4siqqqBiQ")
_PIECE = 1 << 20


def index_name(encoder: str) -> str:
    """Folder name of an encoder's results: its base name; ``…/parent/checkpoint-N`` becomes ``parent_checkpoint-N``."""
    path = encoder.rstrip("/")
    if os.path.basename(path) in ("", ".", ".."):
        path = os.path.realpath(encoder)
    base = os.path.basename(path)
    if base.startswith("checkpoint-"):
        parent = os.path.basename(os.path.dirname(path))
        if parent in ("", ".", ".."):
            parent = os.path.basename(os.path.dirname(os.path.realpath(path)))
        base = f"{parent}_{base}"
    return base


def index_folder(index_save_dir: str | Path, encoder: str, lang: str) -> Path:
    """Where the index of ``lang`` lives."""
    return Path(index_save_dir) / index_name(encoder) / lang


def flat_header(rows: int, dimension: int) -> bytes:
    """The first 45 bytes of a faiss IndexFlatIP file of ``rows`` vectors of ``dimension`` floats."""
    return _HEADER.pack(b"IxFI", dimension, rows, 1 << 20, 1 << 20, 1, 0, rows * dimension)


def assemble_index(store: ShardStore, folder: Path, **more: Any) -> dict[str, Any]:
    """Join the finished shards into ``folder``; returns the manifest. Memory: one piece, whatever the corpus.

    Every shard is checked against its run and its SHA-256 on the way. Raises ``DataError`` for a shard that is missing
    or damaged; then, and on a kill, no file of ``folder`` has been touched.
    """
    digests = {INDEX: hashlib.sha256(), DOCID: hashlib.sha256()}
    for name in (INDEX, DOCID, MANIFEST):
        remove_leftovers(folder, name)
    with (
        clear_disk_errors(f"writing the index to {folder}"),
        atomic_open(folder / INDEX, "wb") as vectors,
        atomic_open(folder / DOCID, "wb") as docids,
    ):
        header = flat_header(store.rows, store.dimension)
        vectors.write(header)
        digests[INDEX].update(header)
        for shard in range(len(store)):
            expected = store.digests(shard)
            _copy(store, shard, "f32", expected["f32"], vectors, digests[INDEX])
            _copy(store, shard, "docid", expected["docid"], docids, digests[DOCID])
    _ask_faiss(folder / INDEX, store.rows, store.dimension)
    files = {name: {"sha256": digest.hexdigest()} for name, digest in digests.items()}
    kept = {key: value for key, value in store.manifest.items() if key not in ("starts", "stored")}  # of use to readers
    manifest = {**kept, **more, "files": files}
    with clear_disk_errors(f"writing {folder / MANIFEST}"):
        write_json_atomic(folder / MANIFEST, manifest)
    return manifest


def _copy(store: ShardStore, shard: int, suffix: str, expected: str, target: IO[bytes], total: Any) -> None:
    digest = hashlib.sha256()
    for piece in pieces(store, shard, suffix):
        digest.update(piece)
        total.update(piece)
        target.write(piece)
    if digest.hexdigest() != expected:
        raise store.damaged(shard, f"SHA-256 of its {suffix} file is {digest.hexdigest()[:12]}…, not {expected[:12]}…")


def pieces(store: ShardStore, shard: int, suffix: str) -> Iterator[bytes]:
    """The bytes of a shard's file. Raises ``DataError`` where it cannot be read; the shard is then removed."""
    # Only reading counts as damage of the shard: this generator is not where a full disk is met.
    try:
        with open(store.path(shard, suffix), "rb") as source:
            while piece := source.read(_PIECE):
                yield piece
    except OSError as error:
        raise store.damaged(shard, f"{suffix} file: {error.strerror}") from error


def _ask_faiss(path: Path, rows: int, dimension: int) -> None:
    """Let faiss open the file, mapped and not read, before a manifest calls it finished."""
    import faiss

    flags = faiss.IO_FLAG_MMAP | getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    if not hasattr(faiss, "IO_FLAG_MMAP_IFC"):
        return  # older faiss would read all the vectors into memory here
    index = faiss.read_index(str(path), flags)
    if (index.ntotal, index.d) != (rows, dimension):
        raise DataError(f"faiss reads {index.ntotal} vectors of {index.d}, expected {rows} of {dimension}")


def remove_index(folder: Path) -> None:
    """Remove an index, and its folder unless something else is in it."""
    remove_named(folder, INDEX, DOCID, MANIFEST)


class DocIds(Sequence[str]):
    """The ids of a ``docid`` file by row number. Keeps one offset (8 bytes) per id in memory, the text on disk.

    Attributes:
        sha256: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 — closed with this object
        self._lock = threading.Lock()  # the file's position is one for all threads
        parts, position, digest = [np.zeros(1, dtype=np.int64)], 0, hashlib.sha256()
        while piece := self._file.read(_PIECE):
            ends = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10)
            parts.append(ends + position + 1)
            position += len(piece)
            digest.update(piece)
        self.sha256 = digest.hexdigest()
        self._offsets = np.concatenate(parts)
        if self._offsets[-1] != position:  # a last line without its line end, as other tools write it
            self._offsets = np.append(self._offsets, position + 1)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        with self._lock:
            self._file.seek(start)
            return self._file.read(stop - start - 1).decode()


class FlatIndex:
    """A read-only view of an index folder: ``rows`` x ``dimension`` float32 on disk, read block by block.

    What is read is what was written: the docids are compared with the manifest's checksum here, the vectors when
    :meth:`blocks` has first gone through them. Of an index without a manifest (made by another program), ids must be
    words that differ, and vectors finite.

    Raises:
        DataError: a file is missing, damaged or of another kind, or the two do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / INDEX
        for name in (INDEX, DOCID):
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder}: no {name} file; run step0-generate_embedding.py for it first")
        self.manifest = read_manifest(self.folder / MANIFEST)
        self._checksums = {name: str(file["sha256"]) for name, file in (self.manifest or {}).get("files", {}).items()}
        self._checked = False  # the vectors
        self.rows, self.dimension = self._read_header()
        self.docids = DocIds(self.folder / DOCID)
        if len(self.docids) != self.rows:
            raise DataError(f"{self.folder}: {self.rows} vectors in index, {len(self.docids)} ids in docid")
        if DOCID not in self._checksums:
            self._check_ids()
        elif self.docids.sha256 != self._checksums[DOCID]:
            raise self._changed(DOCID)

    def _changed(self, name: str) -> DataError:
        return DataError(
            f"{self.folder / name} is not the file that {MANIFEST} beside it lists (its SHA-256 differs): changed, "
            "damaged or of another index; run step0 with --overwrite True"
        )

    def _check_ids(self) -> None:
        """Refuse ids of another program that are no ids: a run file could not hold them, or not tell them apart."""
        hashes = np.empty(self.rows, dtype=np.int64)
        for row in range(self.rows):
            docid = self._docid(row)
            if docid.split() != [docid] or docid[0] == "\ufeff":  # a byte order mark, before the first
                raise DataError(f"{self.folder / DOCID}:{row + 1}: expected one word as docid, found {docid!r}")
            hashes[row] = hash(docid)
        distinct, counts = np.unique(hashes, return_counts=True)
        seen: dict[str, int] = {}
        for row in np.flatnonzero(np.isin(hashes, distinct[counts > 1])).tolist():
            docid = self._docid(row)
            if docid in seen:
                raise DataError(f"{self.folder / DOCID}:{row + 1}: {docid!r} was there before, in line {seen[docid]}")
            seen[docid] = row + 1

    def _docid(self, row: int) -> str:
        try:
            return str(self.docids[row])
        except UnicodeDecodeError as error:
            raise DataError(f"{self.folder / DOCID}:{row + 1}: not UTF-8 text ({error.reason})") from error

    def _read_header(self) -> tuple[int, int]:
        with open(self.path, "rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:4] not in (b"IxFI", b"IxF2"):
            raise DataError(f"{self.path}: expected a faiss IndexFlatIP file, it starts with {header[:4]!r}")
        code, dimension, rows, _, _, _, metric, floats = _HEADER.unpack(header)
        size = self.path.stat().st_size
        if code == b"IxF2" or metric != 0:
            raise DataError(f"{self.path}: an L2 index; expected inner products (IndexFlatIP)")
        if min(rows, dimension) < 0 or floats != rows * dimension or size != _HEADER.size + 4 * floats:
            raise DataError(
                f"{self.path}: {rows} x {dimension} floats announced, {size} bytes found; the file is damaged, run "
                "step0 with --overwrite True"
            )
        return rows, dimension

    def check_encoder(self, description: dict[str, Any], hint: str) -> None:
        """Refuse this index where another model, pooling or normalization made it.

        Args:
            description: what the encoder at hand says of itself (``TextEncoder.describe``).
            hint: what the user should do, for the message.

        Raises:
            UsageError: something differs. An index without a manifest is taken on trust, with a line in the log.
        """
        if self.manifest is None:
            logger.warning("%s has no manifest: taken on trust that this encoder made it", self.folder)
            return
        keys = ("model", "pooling", "normalize_embeddings", "dimension")
        there, here = ({key: each.get(key) for key in keys} for each in (self.manifest["identity"], description))
        differing = differences(there, here)
        if differing:
            raise UsageError(f"{self.folder} was made by another encoder ({'; '.join(differing)}): {hint}")

    def checksum(self) -> str:
        """SHA-256 of the vectors' file, from the manifest where there is one."""
        return self._checksums.get(INDEX) or sha256_file(self.path)

    def blocks(self, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """``(first row, vectors [n, dimension])`` through the file; each array is a new one and may be kept.

        Raises:
            DataError: at the end of the first time, when the vectors are not those that the manifest lists.
        """
        digest, expected = hashlib.sha256(), self._checksums.get(INDEX)
        with open(self.path, "rb", buffering=0) as stream:
            digest.update(stream.read(_HEADER.size))
            for start in range(0, self.rows, block_rows):
                block = np.empty((min(block_rows, self.rows - start), self.dimension), dtype="<f4")
                _read_fully(stream, block, self.path)
                if not self._checked:
                    digest.update(block.data)
                    if expected is None and not np.isfinite(block).all():
                        row = start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
                        raise DataError(f"{self.path}: the vector of {self._docid(row)!r} is not finite; make it again")
                yield start, block
        if not self._checked and expected is not None and digest.hexdigest() != expected:
            raise self._changed(INDEX)
        self._checked = True

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of the given rows, ``[n, dimension]`` float32."""
        found = np.empty((len(rows), self.dimension), dtype="<f4")
        with open(self.path, "rb", buffering=0) as stream:
            for place, row in enumerate(rows):
                stream.seek(_HEADER.size + int(row) * self.dimension * 4)
                _read_fully(stream, found[place], self.path)
        return found


def _read_fully(stream: IO[bytes], array: np.ndarray, path: Path) -> None:
    view = memoryview(array).cast("B")  # type: ignore[arg-type]
    while view:
        got = stream.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise DataError(f"{path}: ends before its last vector; the file is damaged")
        view = view[got:]
