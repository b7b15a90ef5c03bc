"""Reading a corpus of ``docs-*.jsonl.gz`` files: streamed, checked before any work is spent on it.

``survey`` reads everything once and keeps nothing: it counts passages, and finds broken lines, empty passages and
repeated docids. Repeats are found with bounded memory: 64-bit hashes go to bucket files on disk, one bucket is sorted
at a time, and only hashes that occur twice are looked up as text. ``stream`` then yields passages from any position,
skipping whole files and parsing only what it yields. In a plain file it goes straight to the place: the survey notes
where every 2,048th passage begins. A packed file (.gz, .zst) has no such places (deflate goes on from the 32 KiB before
it), so it is unpacked from its own beginning, once for all that is read of it in ascending order.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from FlagEmbedding.schema.rows import MISSING
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import hashing
from FlagEmbedding.utils.io import located_lines, packing, parse_json
from FlagEmbedding.utils.texts import half_pair, is_blank

_BUCKETS = 64
_STRIDE = 2_048  # passages between two places of a plain file from which reading may begin
Starts = Sequence[Sequence[Sequence[int]]]


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
    """What a corpus holds: passages of each file, in file order, and how many have no text.

    Attributes:
        starts: of each file, byte offset and line of every 2,048th passage; of a packed file none.
    """

    passages: list[int]
    empty: int
    starts: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.passages)


def survey(files: Sequence[Path], allow_empty: bool = False, keep: Callable[[Passage], object] | None = None) -> Survey:
    """Read the corpus once, check every line and hash the files; memory does not grow with it.

    Args:
        keep: given every passage, by who wants something of it from the same reading.

    Raises:
        DataError: a line that is no passage, a docid that occurs twice, a file that cannot be unpacked, an empty
            corpus, and, unless ``allow_empty``, a passage without text.
    """
    counts, empty = [0] * len(files), 0
    starts: list[list[tuple[int, int]]] = [[] for _ in files]
    with ExitStack() as stack:
        buckets = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_BUCKETS)]
        for place, path in enumerate(files):
            with hashing(path) as digest:
                for offset, number, line in _lines(path, digest):
                    passage = _parse(path, number, line)
                    if counts[place] % _STRIDE == 0 and not packing(path):
                        starts[place].append((offset, number))
                    counts[place] += 1
                    if is_blank(passage.text):
                        empty += 1
                        if not allow_empty:
                            raise DataError(
                                f"{path}:{passage.line}: passage {passage.docid!r} has no text; remove it, or pass "
                                "--allow_empty True to embed it as it is"
                            )
                    key = _hash(passage.docid)
                    buckets[key[0] % _BUCKETS].write(key)
                    if keep is not None:
                        keep(passage)
        repeated = {key for bucket in buckets for key in _repeated(bucket)}
    if repeated:
        _report_repeat(files, repeated)
    if not sum(counts):
        raise DataError(f"{files[0].parent}: the corpus holds no passage")
    return Survey(counts, empty, starts)


def _hash(docid: str) -> bytes:
    return hashlib.blake2b(docid.encode(), digest_size=8).digest()


def _repeated(bucket: IO[bytes]) -> list[bytes]:
    bucket.seek(0)
    hashes, counts = np.unique(np.frombuffer(bucket.read(), dtype="<u8"), return_counts=True)
    return [key.tobytes() for key in hashes[counts > 1]]


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


def stream(
    files: Sequence[Path], passages: Sequence[int], spans: Iterable[tuple[int, int]], starts: Starts = ()
) -> Iterator[list[Passage]]:
    """The passages of each span (first, past-the-end) of the corpus, one list per span, in any order.

    A span behind the one before it is read on from there; else reading begins at the last start before it.

    Args:
        passages: passages of each file, as :func:`survey` counted them: files outside the spans are not opened.
        spans: asked for one by one, as their passages are.
        starts: of the survey; without them a file is read from its beginning.
    """
    firsts = [0, *accumulate(passages)]
    reading: Iterator[tuple[int, Path, int, str]] = iter(())
    at = sys.maxsize  # the passage that `reading` gives next
    for first, past in spans:
        file = bisect_right(firsts, first) - 1
        block = min((first - firsts[file]) // _STRIDE, len(starts[file]) - 1) if file < len(starts) else -1
        begin = firsts[file] + max(0, block) * _STRIDE
        if not begin <= at <= first:
            reading = _read_on(files, firsts, file, begin, tuple(starts[file][block]) if block >= 0 else (0, 1))
        found = []
        for at, path, number, line in reading:
            if at >= first:
                found.append(_parse(path, number, line))
            if at + 1 >= past:
                break
        at += 1
        if len(found) != past - first:
            raise DataError(f"{files[0].parent}: ends before passage {past}; the corpus changed while it was read")
        yield found


def _read_on(
    files: Sequence[Path], firsts: Sequence[int], file: int, begin: int, start: tuple[int, ...]
) -> Iterator[tuple[int, Path, int, str]]:
    """``(number of the passage, file, line number, line)`` from passage ``begin`` to the end of the corpus."""
    for place in range(file, len(files)):
        first, at = (begin, (start[0], start[1])) if place == file else (firsts[place], (0, 1))
        for position, (_, number, line) in enumerate(_lines(files[place], start=at), first):
            yield position, files[place], number, line


def _lines(path: Path, digest: Any = None, start: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, int, str]]:
    return (found for found in located_lines(path, "corpus", digest, start) if found[2].strip())


def read_file(path: Path, digest: Any = None) -> Iterator[Passage]:
    """Every passage of one file; ``digest`` is told the file's bytes."""
    for _, number, line in _lines(path, digest):
        yield _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> Passage:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not a line of JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected an object with docid, title and text, found {type(value).__name__}")
    own = "_id" if "docid" not in value and "_id" in value else "docid"  # BEIR's name for it
    if value.get("title") is None:
        value["title"] = ""
    for key in (own, "title", "text"):
        found = value.get(key, MISSING)
        if not isinstance(found, str):
            was = "which is missing" if found is MISSING else f"found {type(found).__name__}"
            raise DataError(f"{path}:{number}: expected a string as {key!r}, {was}")
        if (half := half_pair(found)) is not None:
            what = f"half a surrogate pair at character {half}"
            raise DataError(f"{path}:{number}: {key!r} holds {what}; replace it by a whole character")
    docid = value[own]
    if not docid or docid.split() != [docid]:
        raise DataError(f"{path}:{number}: a docid is one word without white space, found {docid!r}")
    return Passage(docid, value["title"], value["text"], path, number)


def passage_text(passage: Passage, with_title: bool) -> str:
    """The text that is embedded: ``text`` alone as published, or title, space, text."""
    return f"{passage.title} {passage.text}".strip() if with_title else passage.text
