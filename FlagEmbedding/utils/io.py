"""Files: text and JSON, plain or packed (gzip, zstd), and writing so that a killed run leaves no half file behind."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from FlagEmbedding.utils.errors import DataError

PathLike = str | os.PathLike[str]
READ_ERRORS = (OSError, EOFError, zlib.error)  # what reading a packed file that is damaged or cut off raises


def packing(path: PathLike) -> str:
    """How a file is packed, as its name says: ``.gz``, ``.zst`` or nothing."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    return ending if ending in (".gz", ".zst") else ""


def unpacked(path: PathLike, stored: IO[bytes]) -> IO[bytes]:
    """The bytes of ``stored``, an open file, unpacked as its name says. Reading raises one of ``READ_ERRORS``."""
    kind = packing(path)
    if kind == ".gz":
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if kind == ".zst":
        import pyarrow  # it comes with datasets, and brings zstd

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), "zstd"))
    return stored


def decode_line(line: bytes) -> str:
    """A line of a UTF-8 text file; a byte order mark is left out (joined files have several).

    Raises:
        UnicodeError: it is not UTF-8, or holds a NUL, as UTF-16 does.
    """
    text = line.decode("utf-8").removeprefix("\ufeff")
    if "\0" in text:
        raise UnicodeError("a NUL character; it may be UTF-16")
    return text


def not_utf8(line: bytes, error: UnicodeError) -> str:
    """What is wrong with a line that :func:`decode_line` refuses."""
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if isinstance(error, UnicodeDecodeError):
        return f"{error.reason} at byte {error.start}"
    return str(error)


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
    """The lines that are not blank; see :func:`all_lines`."""
    return ((number, line) for number, line in all_lines(path, kind, digest) if line.strip())


def all_lines(path: PathLike, kind: str, digest: Any = None) -> Iterator[tuple[int, str]]:
    """``(line number, line)`` of every line of a UTF-8 text file; ``.gz`` and ``.zst`` are unpacked.

    Args:
        kind: what the file is, for messages: "run", "corpus".
        digest: told the file's bytes as they are stored; complete when the lines are through.

    Raises:
        DataError: the file is missing, damaged or not UTF-8.
    """
    return ((number, line) for _, number, line in located_lines(path, kind, digest))


def located_lines(
    path: PathLike, kind: str, digest: Any = None, start: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, int, str]]:
    """:func:`all_lines` with the place of each: ``(byte offset of the unpacked text, line number, line)``.

    Args:
        start: offset and number of the line to begin with; only of a file that is not packed.
    """
    offset, number = start[0], start[1] - 1
    try:
        with io.BufferedReader(_HashedFile(path, digest) if digest else io.FileIO(path), 1 << 20) as stored:
            if offset:
                stored.seek(offset)
            for number, line in enumerate(unpacked(path, stored), start[1]):
                try:
                    text = decode_line(line)
                except UnicodeError as error:
                    what = f"not UTF-8 text ({not_utf8(line, error)}); save it as UTF-8"
                    raise DataError(f"{path}:{number}: {what}") from error
                yield offset, number, text
                offset += len(line)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {kind} file") from error
    except READ_ERRORS as error:
        raise DataError(
            f"{path}:{number + 1}: the {kind} file cannot be read further ({error}); make or fetch it again"
        ) from error


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads``, with ``ValueError`` also for what is nested too deeply. ``pairs``: what makes an object."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: PathLike) -> Any:
    """The value of a JSON file. Raises ``OSError`` or ``ValueError`` where there is none."""
    return parse_json(Path(path).read_text(encoding="utf-8-sig"))


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


@contextmanager
def atomic_text(path: PathLike) -> Iterator[IO[str]]:
    """:func:`atomic_open` for text, packed as the name says; the same text gives the same bytes."""
    kind = packing(path)
    with ExitStack() as opened:
        stream = opened.enter_context(atomic_open(path, "wb" if kind else "w"))
        if kind == ".gz":
            packed: Any = gzip.GzipFile("", "wb", fileobj=stream, mtime=0)
        elif kind:
            import pyarrow

            file = pyarrow.PythonFile(os.fdopen(os.dup(stream.fileno()), "wb"), "w")
            packed = pyarrow.CompressedOutputStream(file, "zstd")
        else:
            yield stream
            return
        with packed, io.TextIOWrapper(packed, encoding="utf-8", newline="") as text:
            yield text


def _umask() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError):  # not Linux: it can be asked for only by setting it
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a kill left of files ``name`` (a glob pattern) that :func:`atomic_open` was writing in ``folder``."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


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
