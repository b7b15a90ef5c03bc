"""Vectors of a corpus on disk, shard by shard, so that a run can be killed at any moment and go on.

The working folder holds

    manifest.json          what is being encoded and how (its identity), by which run, how many vectors, in which shards
    shard-000007.f32       the vectors of shard 7: float32, little endian, one after the other
    shard-000007.docid     their docids, one per line
    shard-000007.json      their number, run and SHA-256 of both files; written last: without it the shard is not there
    claims/                who is encoding which shard (indexing/claims.py)

Shard i always holds passages ``i * shard_size`` to ``(i + 1) * shard_size``, whoever encodes it: that makes the
bytes independent of kills and of the number of processes. Every file appears by renaming a finished one. Only files
that the manifest implies are ever removed; it goes last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.folders import remove_named
from FlagEmbedding.utils.identity import check_identity
from FlagEmbedding.utils.io import atomic_open, read_json, remove_leftovers, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

MANIFEST, CLAIMS = "manifest.json", "claims"
_RECORD = re.compile(r"shard-(\d{6,})\.json")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EROFS, errno.EPERM}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_NO_FILE = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}


@contextmanager
def clear_disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's word for a full, read-only or vanished disk into one line. ``doing``: 'writing …'."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(
                f"disk full while {doing}: {error.strerror}. What was finished is kept, nothing half-written is left; "
                "make room and run the same command again"
            ) from error
        if error.errno in _NO_PERMISSION | _NO_FILE | _IN_THE_WAY:
            what = "no permission" if error.errno in _NO_PERMISSION else "the disk failed"
            what = "something else is in the way" if error.errno in _IN_THE_WAY else what
            raise DataError(f"{what} while {doing}: {error.strerror}: {error.filename}") from error
        raise


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at ``path``; None where there is none. Raises ``DataError`` when it cannot be read."""
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); move it away to start again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise DataError(f"{path}: expected a manifest with an 'identity'; move it away to start again")
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(f, dict) and "sha256" in f for f in files.values()):
        raise DataError(f"{path}: expected the 'files' with their sha256; move it away to start again")
    return manifest


def decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what says how vectors were computed, not which: slabs change them by rounding alone."""
    return {name: value for name, value in identity.items() if name != "slab_tokens"}


def check_manifest(manifest: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Refuse (``UsageError``) a manifest of other arguments, naming each difference."""
    hint = (
        "Give the same arguments as before, pass --overwrite True to encode again, or choose another --index_save_dir"
    )
    check_identity(decisive(manifest["identity"]), decisive(identity), path, hint)
    before, now = (each.get("slab_tokens") for each in (manifest["identity"], identity))
    if before != now:
        logger.info(
            "%s: begun in slabs of %s tokens, goes on in slabs of %s (--batch_size, memory): the vectors agree up to "
            "rounding",
            path.parent, before, now,
        )  # fmt: skip


class ShardStore:
    """The working folder of one encoding. Begin it with :meth:`create`.

    Attributes:
        suffixes: of the files of a shard; a record of them stands beside these.
    """

    suffixes: tuple[str, ...] = ("f32", "docid")

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        for key, least in (("rows", 0), ("shard_size", 1), ("dimension", 1)):
            if not isinstance(manifest.get(key), int) or manifest[key] < least:
                raise DataError(f"{folder / MANIFEST}: expected a whole number as {key!r}; move the folder away")
        self.rows: int = manifest["rows"]
        self.shard_size: int = manifest["shard_size"]
        self.dimension: int = manifest["dimension"]

    @classmethod
    def create(
        cls, folder: Path, identity: dict[str, Any], rows: int, dimension: int, shard_size: int, **more: Any
    ) -> ShardStore:
        """Start an empty store; ``more`` is kept in the manifest beside the identity.

        Raises:
            UsageError: ``folder`` holds anything: it would be lost, or count as a shard of these arguments.
        """
        sizes = {"rows": rows, "dimension": dimension, "shard_size": shard_size}
        manifest = {"identity": identity, **sizes, **more, "run": uuid.uuid4().hex}
        with clear_disk_errors(f"creating {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, MANIFEST)
            if held := sorted(os.listdir(folder)):
                raise UsageError(
                    f"{folder} holds {held[0]!r}, which this program did not write or cannot tell any more; move the "
                    "folder away, or choose another --index_save_dir"
                )
            write_json_atomic(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return (self.rows + self.shard_size - 1) // self.shard_size

    def span(self, shard: int) -> tuple[int, int]:
        """First and past-the-end passage of a shard."""
        return shard * self.shard_size, min(self.rows, (shard + 1) * self.shard_size)

    def path(self, shard: int, suffix: str) -> Path:
        """File of a shard: suffix 'f32', 'docid' or 'json'."""
        return self.folder / f"shard-{shard:06d}.{suffix}"

    def finished(self) -> set[int]:
        """Numbers of the shards that are on disk."""
        numbers = (_RECORD.fullmatch(name) for name in os.listdir(self.folder))
        return {int(found[1]) for found in numbers if found and int(found[1]) < len(self)}

    def clean(self) -> None:
        """Remove what a killed run left half-written (call from one process, before others write)."""
        remove_leftovers(self.folder, "shard-*")

    def forget_claims(self) -> None:
        """Remove the claims of all workers (while none is working)."""
        remove_named(self.folder / CLAIMS, "[0-9]" * 6, "[0-9]" * 6 + ".*", "*.alive")

    def write(self, shard: int, vectors: np.ndarray, docids: Sequence[str]) -> None:
        """Store one shard: ``vectors [rows, dimension]`` float32 and as many docids."""
        start, stop = self.span(shard)
        if vectors.shape != (stop - start, self.dimension) or len(docids) != stop - start:
            raise DataError(
                f"shard {shard} of {self.folder}: expected {stop - start} rows of {self.dimension}, got vectors "
                f"{list(vectors.shape)} and {len(docids)} docids; did the corpus change while it was read?"
            )
        self._put(shard, {"f32": np.ascontiguousarray(vectors, dtype="<f4").tobytes()}, docids)

    def _put(self, shard: int, files: dict[str, bytes], docids: Sequence[str]) -> None:
        """Write the files of a shard, its docids, and last the record that it is whole."""
        files = {**files, "docid": "".join(f"{docid}\n" for docid in docids).encode()}
        with clear_disk_errors(f"writing shard {shard} to {self.folder}"):
            for suffix, content in files.items():
                with atomic_open(self.path(shard, suffix), "wb") as stream:
                    stream.write(content)
            digests = {f"{name}_sha256": hashlib.sha256(content).hexdigest() for name, content in files.items()}
            record = {"rows": len(docids), "run": self.manifest.get("run"), **digests}
            write_json_atomic(self.path(shard, "json"), record)

    def digests(self, shard: int) -> dict[str, str]:
        """The SHA-256 that was noted of each file of the shard, by suffix.

        Raises:
            DataError: the record cannot be read, or another run wrote the shard.
        """
        try:
            record = read_json(self.path(shard, "json"))
            digests = {suffix: str(record[f"{suffix}_sha256"]) for suffix in self.suffixes}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(shard, "its record cannot be read") from error
        if record.get("run") != self.manifest.get("run"):
            raise self.damaged(shard, "another run wrote it")
        return digests

    def damaged(self, shard: int, what: str) -> DataError:
        """Forget a damaged shard and say so; the next run encodes it again."""
        self._remove(shard)
        return DataError(
            f"shard {shard} of {self.folder} is damaged ({what}); it was removed, run the same command again to "
            "encode it again"
        )

    def _remove(self, shard: int) -> None:
        for suffix in ("json", *self.suffixes):
            self.path(shard, suffix).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the store's files, and the folder unless something else is in it."""
        self.clean()
        self.forget_claims()
        for shard in range(len(self)):
            self._remove(shard)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()
