"""Reading a corpus of ``docs-*.jsonl.gz`` files: streamed, checked before any work is spent on it.

``survey`` reads everything once and keeps nothing: it counts passages, and finds broken lines, empty passages and
repeated docids. Repeats are found with bounded memory: 64-bit hashes go to bucket files on disk, one bucket is sorted
at a time, and only hashes that occur twice are looked up as text. ``stream`` then yields passages from any position,
skipping whole files and parsing only what it yields.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from FlagEmbedding.schema.rows import MISSING
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import hashing
from FlagEmbedding.utils.io import numbered_lines, parse_json
from FlagEmbedding.utils.texts import half_pair, is_blank

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


def survey(files: Sequence[Path], allow_empty: bool = False, keep: Callable[[Passage], object] | None = None) -> Survey:
    """Read the corpus once, check every line and hash the files; memory does not grow with it.

    Args:
        keep: given every passage, by who wants something of it from the same reading.

    Raises:
        DataError: a line that is no passage, a docid that occurs twice, a file that cannot be unpacked, an empty
            corpus, and, unless ``allow_empty``, a passage without text.
    """
    counts, empty = [0] * len(files), 0
    with ExitStack() as stack:
        buckets = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_BUCKETS)]
        for place, path in enumerate(files):
            with hashing(path) as digest:
                for passage in read_file(path, digest):
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
    return Survey(counts, empty)


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


def stream(files: Sequence[Path], passages: Sequence[int], spans: Sequence[tuple[int, int]]) -> Iterator[list[Passage]]:
    """The passages of each span (first, past-the-end; ascending) of the corpus, one list per span.

    Args:
        passages: passages of each file, as :func:`survey` counted them: files outside the spans are not opened.
    """
    wanted = iter(spans)
    span = next(wanted, None)
    first, found = 0, []
    for path, count in zip(files, passages, strict=True):
        if span is None:
            return
        if first + count > span[0]:
            for position, (number, line) in enumerate(numbered_lines(path, "corpus"), first):
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


def read_file(path: Path, digest: Any = None) -> Iterator[Passage]:
    """Every passage of one file; ``digest`` is told the file's bytes."""
    for number, line in numbered_lines(path, "corpus", digest):
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
