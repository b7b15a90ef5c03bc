"""Reading a corpus of ``docs-*.jsonl.gz`` files: streamed, checked before any work is spent on it.

``survey`` reads everything once and keeps nothing: it counts passages (for the time left), and finds broken lines,
empty passages and repeated docids before the first is encoded. Repeats are found with bounded memory: 64-bit
hashes go to bucket files on disk, one bucket is sorted at a time, and only hashes that occur twice are looked up
as text. ``stream`` then yields passages from any position, skipping whole files and parsing only what it yields.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from FlagEmbedding.utils.errors import DataError

_BUCKETS = 64


@dataclass(frozen=True)
class Passage:
    """One passage and where it stands."""

    docid: str
    title: str
    text: str
    path: Path
    line: int


@dataclass(frozen=True)
class Survey:
    """What a corpus holds: passages of each file, in file order, and how many have no text."""

    passages: list[int]
    empty: int

    @property
    def total(self) -> int:
        return sum(self.passages)


def survey(files: Sequence[Path], allow_empty: bool = False) -> Survey:
    """Read the corpus once and check every line; memory does not grow with it.

    Raises ``DataError`` (file:line, what, what to do) for a line that is no passage, a docid that occurs twice, a
    file that cannot be unpacked, an empty corpus, and, unless ``allow_empty``, a passage without text.
    """
    counts, empty = [], 0
    with ExitStack() as stack:
        buckets = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_BUCKETS)]
        for path in files:
            count = 0
            for passage in read_file(path):
                count += 1
                if not passage.text.strip():
                    empty += 1
                    if not allow_empty:
                        raise DataError(
                            f"{path}:{passage.line}: passage {passage.docid!r} has no text; remove it, or pass "
                            "--allow_empty True to embed it as it is"
                        )
                key = _hash(passage.docid)
                buckets[key[0] % _BUCKETS].write(key)
            counts.append(count)
        repeated = {key for bucket in buckets for key in _repeated(bucket)}
    if repeated:
        _report_repeat(files, repeated)
    if not sum(counts):
        raise DataError(f"{files[0].parent}: the corpus holds no passage")
    return Survey(counts, empty)


def _hash(docid: str) -> bytes:
    return blake2b(docid.encode(), digest_size=8).digest()


def _repeated(bucket: IO[bytes]) -> list[bytes]:
    bucket.seek(0)
    hashes = np.sort(np.frombuffer(bucket.read(), dtype="<u8"))
    return [key.tobytes() for key in np.unique(hashes[1:][hashes[1:] == hashes[:-1]])]


def _report_repeat(files: Sequence[Path], suspects: set[bytes]) -> None:
    """Raise for the first docid that really is there twice (two docids may share a hash)."""
    seen: dict[str, str] = {}
    for path in files:
        for passage in read_file(path):
            if _hash(passage.docid) in suspects:
                if passage.docid in seen:
                    raise DataError(
                        f"{path}:{passage.line}: docid {passage.docid!r} was there before, at {seen[passage.docid]}; "
                        "remove one of the two"
                    )
                seen[passage.docid] = f"{path}:{passage.line}"


def stream(files: Sequence[Path], passages: Sequence[int], spans: Sequence[tuple[int, int]]) -> Iterator[list[Passage]]:
    """The passages of each span (first, past-the-end; ascending) of the corpus, one list a span.

    :param passages: passages of each file, as :func:`survey` counted them: files outside the spans are not opened.
    """
    wanted = iter(spans)
    span = next(wanted, None)
    first, found = 0, []
    for path, count in zip(files, passages, strict=True):
        if span is None:
            return
        if first + count > span[0]:
            for position, number, line in _lines(path, first):
                if span is None:
                    return
                if position < span[0]:
                    continue
                found.append(_parse(path, number, line))
                if position + 1 == span[1]:
                    yield found
                    found, span = [], next(wanted, None)
        first += count
    if span is not None:
        raise DataError(f"{files[0].parent}: ends before passage {span[1]}; the corpus changed while it was read")


def read_file(path: Path) -> Iterator[Passage]:
    """Every passage of one file."""
    for _, number, line in _lines(path, 0):
        yield _parse(path, number, line)


def _lines(path: Path, first: int) -> Iterator[tuple[int, int, bytes]]:
    """``(position in the corpus, line number, line)`` of every line that is not blank."""
    position, number = first, 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield position, number, line
                    position += 1
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}:{number + 1}: the file cannot be read further ({error}); fetch it again") from error


def _parse(path: Path, number: int, line: bytes) -> Passage:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not a line of JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected an object with docid, title and text, found {type(value).__name__}")
    docid, text = _string(value, "docid", path, number), _string(value, "text", path, number)
    title = _string(value, "title", path, number) if value.get("title") is not None else ""
    if not docid or docid.split() != [docid]:
        raise DataError(f"{path}:{number}: a docid is one word without white space, found {docid!r}")
    return Passage(docid, title, text, path, number)


def _string(value: dict[str, Any], key: str, path: Path, number: int) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise DataError(f"{path}:{number}: expected a string as {key!r}, found {type(found).__name__}")
    return found


def passage_text(passage: Passage, with_title: bool) -> str:
    """The text that is embedded: ``text`` alone as published, or title, space, text."""
    return f"{passage.title} {passage.text}".strip() if with_title else passage.text
