"""Vectors of a corpus on disk, shard by shard, so that a run can be killed at any moment and go on.

The working folder holds

    manifest.json          what is being encoded and how (its identity), how many vectors, and how many per shard
    shard-000007.f32       the vectors of shard 7: float32, little endian, one after the other
    shard-000007.docid     their docids, one per line
    shard-000007.json      their number and SHA-256 of both files; written last, so a shard without it does not exist

Shard i always holds passages ``i * shard_size`` to ``(i + 1) * shard_size``, whoever encodes it: that makes the
bytes independent of kills and of the number of processes. Every file appears by renaming a finished one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import check_identity
from FlagEmbedding.utils.io import atomic_open, write_json_atomic

MANIFEST = "manifest.json"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def clear_disk_errors(doing: str) -> Iterator[None]:
    """Turn the operating system's word for a full or read-only disk into one line. ``doing``: 'writing shard 7'."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DataError(
                f"disk full while {doing}: {error.strerror}. What was finished is kept, nothing half-written is left; "
                "make room and run the same command again"
            ) from error
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise DataError(f"no permission while {doing}: {error.strerror}: {error.filename}") from error
        raise


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at ``path``; None where there is none. Raises ``DataError`` when it cannot be read."""
    if not path.exists():
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            manifest = json.load(stream)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); pass --overwrite True to start again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise DataError(f"{path}: expected a manifest with an 'identity'; pass --overwrite True to start again")
    return manifest


def check_manifest(manifest: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Refuse (``UsageError``) a manifest of other arguments, naming each difference."""
    hint = (
        "Give the same arguments as before, pass --overwrite True to encode again, or choose another --index_save_dir"
    )
    check_identity(manifest["identity"], identity, path, hint)


class ShardStore:
    """The working folder of one encoding. Open it with :meth:`create` or :meth:`open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.identity: dict[str, Any] = manifest["identity"]
        self.rows: int = manifest["rows"]
        self.shard_size: int = manifest["shard_size"]
        self.dimension: int = manifest["dimension"]

    @classmethod
    def create(
        cls, folder: Path, identity: dict[str, Any], rows: int, dimension: int, shard_size: int, **more: Any
    ) -> ShardStore:
        """Start an empty store; ``more`` is kept in the manifest beside the identity.

        Whatever lies in ``folder`` without a manifest (a kill may have met its removal half done) goes first: a shard
        of other arguments must never count as one of these.
        """
        manifest = {"identity": identity, "rows": rows, "dimension": dimension, "shard_size": shard_size, **more}
        with clear_disk_errors(f"creating {folder}"):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_json_atomic(folder / MANIFEST, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> ShardStore | None:
        """The store a former run left in ``folder``; None where there is none. A store that does not fit is refused."""
        manifest = read_manifest(folder / MANIFEST)
        if manifest is None:
            return None
        check_manifest(manifest, identity, folder / MANIFEST)
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
        return {int(name[6:-5]) for name in os.listdir(self.folder) if name[:6] == "shard-" and name[-5:] == ".json"}

    def clean(self) -> None:
        """Remove what a killed run left half-written (call from one process, before others write)."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def write(self, shard: int, vectors: np.ndarray, docids: Sequence[str]) -> None:
        """Store one shard: ``vectors [rows, dimension]`` float32 and as many docids."""
        start, stop = self.span(shard)
        if vectors.shape != (stop - start, self.dimension) or len(docids) != stop - start:
            raise DataError(
                f"shard {shard} of {self.folder}: expected {stop - start} rows of {self.dimension}, got vectors "
                f"{list(vectors.shape)} and {len(docids)} docids; did the corpus change while it was read?"
            )
        files = {
            "f32": np.ascontiguousarray(vectors, dtype="<f4").tobytes(),
            "docid": "".join(f"{docid}\n" for docid in docids).encode(),
        }
        with clear_disk_errors(f"writing shard {shard} to {self.folder}"):
            for suffix, content in files.items():
                with atomic_open(self.path(shard, suffix), "wb") as stream:
                    stream.write(content)
            digests = {f"{name}_sha256": hashlib.sha256(content).hexdigest() for name, content in files.items()}
            record = {"rows": stop - start, **digests}
            write_json_atomic(self.path(shard, "json"), record)

    def record(self, shard: int) -> dict[str, Any]:
        """What was noted when the shard was finished."""
        try:
            with open(self.path(shard, "json"), encoding="utf-8") as stream:
                record = json.load(stream)
            return {key: record[key] for key in ("rows", "f32_sha256", "docid_sha256")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(shard, "its record cannot be read") from error

    def damaged(self, shard: int, what: str) -> DataError:
        """Forget a damaged shard and say so; the next run encodes it again."""
        for suffix in ("json", "f32", "docid"):
            self.path(shard, suffix).unlink(missing_ok=True)
        return DataError(
            f"shard {shard} of {self.folder} is damaged ({what}); it was removed, run the same command again to "
            "encode it again"
        )

    def remove(self) -> None:
        """Delete the working folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
