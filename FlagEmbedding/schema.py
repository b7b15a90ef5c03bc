"""Training records and the reader of their JSONL files; a problem names file, line and key, and says what to do.

A record is one JSON object a line (a ``.json`` file may also hold one array of such objects)::

    {"query": "…", "pos": ["…"], "neg": ["…", "…"], "pos_scores": [4.1], "neg_scores": [0.3, 1.2], "neg_q": ["…", ""]}

Choices:

* ``pos`` and ``neg`` may be a plain string, read as a list of one. Columns of other names are ignored.
* ``neg_q`` runs parallel to ``neg``: item i is a query that ``neg[i]`` answers, or a list of several such queries.
  A negative that has none is written ``""`` or ``[]``; ``null`` there is a problem, since it is usually a bug upstream.
* An optional column that is ``null`` as a whole counts as absent (that is how table tools write missing columns).
* All problems of all files are counted, the first 20 are shown, in one ``DataError``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from gzip import GzipFile
from pathlib import Path
from typing import IO, Any, TypeVar

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike

SHOWN_PROBLEMS = 20
SUFFIXES = (".json", ".jsonl")
_MISSING = object()  # stands for a key that a row lacks

Item = TypeVar("Item")
Report = Callable[[str, str, str], None]  # key, what was found, what to do
Read = Callable[[Any, str], Item | None]  # an item and its key → what it says, or None where it was reported


@dataclass(frozen=True)
class TrainRecord:
    """One training row."""

    query: str
    pos: list[str]  # passages that answer it, at least one
    neg: list[str]  # passages that do not, at least one
    pos_scores: list[float] | None = None  # the teacher's, of each passage
    neg_scores: list[float] | None = None
    neg_q: list[list[str]] | None = None  # for each negative the queries it answers: 0 to n of them
    line: int = 0  # of the file, from 1


@dataclass(frozen=True)
class Problem:
    """What is wrong in one place. ``line`` 0 means the file or folder as a whole, ``key`` "" the line as a whole."""

    path: str
    line: int
    key: str
    found: str
    hint: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {f'{self.key} ' if self.key else ''}{self.found}; {self.hint}"


@dataclass
class Problems:
    """The first problems and the number of all (a file can have millions)."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: Problem) -> None:
        """Count ``problem``, and keep it when it is one of the first."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(problem)

    def report(self, path: str, line: int, key: str, found: str, hint: str) -> None:
        """Add the ``Problem`` of these fields."""
        self.add(Problem(path, line, key, found, hint))

    def raise_if_any(self) -> None:
        """Raise all of them as one ``DataError``: a single line for a single problem."""
        if self.count == 1:
            raise DataError(str(self.first[0]))
        if self.count:
            shown = "all" if self.count <= len(self.first) else f"the first {len(self.first)}"
            raise DataError(f"{self.count} problems in the data, {shown}:\n" + "\n".join(f"  {p}" for p in self.first))


# ---- files ----


@dataclass(frozen=True)
class DataFile:
    """A file of training rows and the folder, as the user named it, that it counts to."""

    path: str
    folder: str


def find_files(paths: Sequence[PathLike], problems: Problems) -> list[DataFile]:
    """The data files that ``paths`` name: files as given, and the .json/.jsonl files of folders, sorted by name.

    Folders are not searched recursively and hidden files are passed over. What is missing or empty goes to
    ``problems``.
    """
    files: list[DataFile] = []
    for given in map(str, paths):
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file() and p.name[0] != ".")
            if not inside:
                hint = "put the training rows there, one JSON object a line"
                problems.report(given, 0, "", "the folder holds no .json or .jsonl file", hint)
            files += [DataFile(str(p), str(path)) for p in inside]
        elif path.exists():
            files.append(DataFile(str(path), str(path.parent)))
        else:
            problems.report(given, 0, "", "there is no such file or folder", "check the path")
    return files


def read_rows(
    path: PathLike, problems: Problems, stream: IO[bytes] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) for every row of a file that is JSON at all; the rest goes to ``problems``.

    Args:
        stream: the file where it is open already, at its beginning; it stays open.
    """
    path = str(path)
    try:
        with open(path, "rb") if stream is None else nullcontext(stream) as raw:
            for line, value in _values(path, GzipFile(fileobj=raw) if path.endswith(".gz") else raw, problems):
                if isinstance(value, dict):
                    yield line, value
                else:
                    hint = 'write an object: {"query": …, "pos": […], "neg": […]}'
                    problems.report(path, line, "", f"the row is {_kind(value)}", hint)
    except (OSError, EOFError) as error:
        problems.add(unreadable(path, error))


def unreadable(path: str, error: Exception) -> Problem:
    """The problem of a file that the system does not let us read."""
    return Problem(path, 0, "", f"cannot be read ({error})", "check the file and its permissions")


def _values(path: str, stream: Iterable[bytes], problems: Problems) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of every line, or of every item where the file is one array."""
    lines = ((number, raw) for number, raw in enumerate(stream, 1) if raw.strip())
    rows = 0
    for rows, (number, raw) in enumerate(lines, 1):
        text = _decode(path, number, raw if number > 1 else raw.removeprefix(b"\xef\xbb\xbf"), problems)
        if text is None:
            continue
        if rows == 1 and text.lstrip().startswith("["):
            rest = _decode(path, number + 1, b"".join(stream), problems)
            yield from () if rest is None else _array_items(path, number, text + rest, problems)
            return
        try:
            yield number, json.loads(text.rstrip())
        except (ValueError, RecursionError) as error:
            _report_broken(path, number, error, "write one whole JSON object a line", problems)
    if not rows:
        problems.report(path, 0, "", "the file is empty", "write one JSON object a line, or remove the file")


def _decode(path: str, number: int, raw: bytes, problems: Problems) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        found = f"byte 0x{raw[error.start]:02x} at column {column} is not UTF-8"
        problems.report(path, line, "", found, "save the file as UTF-8")
        return None


def _array_items(path: str, first_line: int, text: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The items of a file that is one JSON array, each with the line it starts on."""
    try:
        count = len(json.loads(text))
    except (ValueError, RecursionError) as error:
        line = first_line + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        _report_broken(path, line, error, "write one JSON object a line, or one array of objects", problems)
        return
    if not count:
        problems.report(path, 0, "", "the file is an empty array", "write at least one object into it")
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, first_line, 0
    for _ in range(count):
        while text[at] in ", \t\r\n":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield line, value


def _report_broken(path: str, line: int, error: Exception, hint: str, problems: Problems) -> None:
    detail = str(error)
    if isinstance(error, json.JSONDecodeError):
        detail = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    problems.report(path, line, "", f"broken JSON ({detail})", hint)


# ---- records ----


def read_records(
    path: PathLike, problems: Problems | None = None, stream: IO[bytes] | None = None
) -> Iterator[TrainRecord]:
    """The valid records of a file, in order; ``stream``: as for ``read_rows``.

    Problems are added to ``problems``; without one, a ``DataError`` is raised when the file has been read through.
    """
    found = Problems() if problems is None else problems
    for line, row in read_rows(path, found, stream):
        record = parse_record(row, str(path), line, found)
        if record is not None:
            yield record
    if problems is None:
        found.raise_if_any()


def parse_record(row: dict[str, Any], path: str, line: int, problems: Problems) -> TrainRecord | None:
    """A record out of one JSON object, or None when something is wrong with it."""
    before = problems.count
    report: Report = partial(problems.report, path, line)
    text, passage = ("give the query's text", "give the passage's text, or take the item out")
    query = _text(row.get("query", _MISSING), "query", report, text)
    read, hint = partial(_text, report=report, hint=passage), "give a list of at least one passage"
    pos, neg = (_column(row, key, _is_text, read, report, hint, required=True) for key in ("pos", "neg"))
    score, hint = partial(_score, report=report), "give a list of numbers, or leave the key out"
    pos_scores, neg_scores = (
        _column(row, key, _is_number, score, report, hint) for key in ("pos_scores", "neg_scores")
    )
    hint = "give a list parallel to neg, or leave the key out"
    queries = partial(_queries_of, report=report)
    neg_q = _column(row, "neg_q", lambda value: isinstance(value, str), queries, report, hint)
    for key, values, of, passages in (
        ("pos_scores", pos_scores, "pos", pos),
        ("neg_scores", neg_scores, "neg", neg),
        ("neg_q", neg_q, "neg", neg),
    ):
        if values is not None and passages is not None and len(values) != len(passages):
            hint = 'one item for each, "" where a negative has none' if key == "neg_q" else "one score for each"
            report(key, f"has {len(values)} items, {of} has {len(passages)}", f"give {hint}")
    if problems.count > before or query is None or pos is None or neg is None:
        return None
    return TrainRecord(query, pos, neg, pos_scores, neg_scores, neg_q, line)


def _column(
    row: dict[str, Any], key: str, is_one: Callable[[Any], bool], read: Read[Item], report: Report, hint: str,
    required: bool = False,
) -> list[Item] | None:  # fmt: skip
    """A column's items, each as ``read`` makes it; what ``is_one`` is a list of one. None: absent, or reported."""
    value = [row[key]] if is_one(row.get(key)) else row.get(key)
    if isinstance(value, list) and (value or not required):
        return _items(value, key, read)
    if required or value is not None:
        report(key, f"is {_kind(row.get(key, _MISSING))}", hint)
    return None


def _items(values: list[Any], key: str, read: Read[Item]) -> list[Item] | None:
    """Every item as ``read`` makes it of the value and its key; None where one was reported."""
    read_items = [read(value, f"{key}[{i}]") for i, value in enumerate(values)]
    found = [item for item in read_items if item is not None]
    return found if len(found) == len(values) else None


def _text(value: Any, key: str, report: Report, hint: str) -> str | None:
    """``value`` if it is text that can be encoded and is not blank; otherwise reported."""
    if not _is_text(value):
        report(key, f"is {_kind(value)}", hint)
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        report(key, f"holds half of a surrogate pair at character {error.start + 1}", "write whole characters")
        return None
    return str(value)


def _score(value: Any, key: str, report: Report) -> float | None:
    if not _is_number(value):
        found = f"is {_kind(value)}"
    elif abs(value) <= sys.float_info.max:
        return float(value)
    else:
        found = "is NaN" if value != value else "is infinite"
    report(key, found, "give a finite number")
    return None


def _queries_of(value: Any, key: str, report: Report) -> list[str] | None:
    """The queries of one negative: none, one, or several in a list."""
    if isinstance(value, str) and not value.strip():
        return []
    if isinstance(value, list):
        return _items(value, key, partial(_text, report=report, hint="give the query's text, or take the item out"))
    text = _text(value, key, report, 'give a query that this negative answers, several in a list, or "" for none')
    return None if text is None else [text]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What ``value`` is, for a message."""
    if value is _MISSING:
        return "missing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        shown = f"{value[:40]!r}…" if len(value) > 40 else repr(value)
        return f"the text {shown}" if value.strip() else "empty text"
    return "an object" if isinstance(value, dict) else "a list" if value else "an empty list"
