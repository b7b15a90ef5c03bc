"""Files: reading text and JSON with or without gzip, and writing so that a killed run leaves no half file behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from FlagEmbedding.utils.errors import DataError

PathLike = str | os.PathLike[str]


def open_text(path: PathLike) -> IO[str]:
    """Open a UTF-8 text file for reading; ``.gz`` is unpacked on the way, a byte order mark is left out."""
    if str(path).endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


class _HashedFile(io.FileIO):
    """A file that tells ``digest`` the bytes that are read of it."""

    def __init__(self, path: PathLike, digest: Any) -> None:
        super().__init__(path)
        self._digest = digest

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count


def numbered_lines(path: PathLike, kind: str, digest: Any = None) -> Iterator[tuple[int, str]]:
    """``(line number, line)`` of every line that is not blank of a UTF-8 text file; ``.gz`` is unpacked.

    Args:
        kind: what the file is, for messages: "run", "corpus".
        digest: told the file's bytes as they are stored; complete when the lines are through.

    Raises:
        DataError: the file is missing, damaged or not UTF-8.
    """
    number = 0
    try:
        with io.BufferedReader(_HashedFile(path, digest) if digest else io.FileIO(path), 1 << 20) as stored:
            lines = gzip.GzipFile(fileobj=stored) if str(path).endswith(".gz") else stored
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, text
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {kind} file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{number + 1}: the {kind} file cannot be read further ({error}); make or fetch it again"
        ) from error


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, with ``ValueError`` also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: PathLike) -> Any:
    """The value of a JSON file. Raises ``OSError`` or ``ValueError`` where there is none."""
    return parse_json(Path(path).read_text(encoding="utf-8"))


@contextmanager
def atomic_open(path: PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Write beside ``path`` and move into place only when the block ends well (fsync, then ``os.replace``)."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        follow_umask(temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def follow_umask(path: PathLike) -> None:
    """Give a file the mode of any new one: libraries that write beside and rename leave it to its owner alone."""
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError):  # not Linux: it can be asked for only by setting it
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def write_json_atomic(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically. NaN is refused: it is not JSON."""
    with atomic_open(path) as stream:
        json.dump(value, stream, ensure_ascii=False, indent=2, allow_nan=False)
        stream.write("\n")


def sha256_file(path: PathLike) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
