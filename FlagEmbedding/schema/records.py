"""One training row: what it must hold, and what is said where it does not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

from FlagEmbedding.schema.problems import Problems
from FlagEmbedding.schema.rows import MISSING, kind_of, read_rows
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.texts import half_pair, is_blank

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
    query = _text(row.get("query", MISSING), "query", report, text)
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
        report(key, f"is {kind_of(row.get(key, MISSING))}", hint)
    return None


def _items(values: list[Any], key: str, read: Read[Item]) -> list[Item] | None:
    """Every item as ``read`` makes it of the value and its key; None where one was reported."""
    read_items = [read(value, f"{key}[{i}]") for i, value in enumerate(values)]
    found = [item for item in read_items if item is not None]
    return found if len(found) == len(values) else None


def _text(value: Any, key: str, report: Report, hint: str) -> str | None:
    """``value`` if it is text that can be encoded and is not blank; otherwise reported."""
    if not _is_text(value):
        report(key, f"is {kind_of(value)}", hint)
        return None
    if (half := half_pair(value)) is not None:
        report(key, f"holds half of a surrogate pair at character {half}", "write whole characters")
        return None
    return str(value)


def _score(value: Any, key: str, report: Report) -> float | None:
    if not _is_number(value):
        found = f"is {kind_of(value)}"
    elif abs(value) <= sys.float_info.max:
        return float(value)
    else:
        found = "is NaN" if value != value else "is infinite"
    report(key, found, "give a finite number")
    return None


def _queries_of(value: Any, key: str, report: Report) -> list[str] | None:
    """The queries of one negative: none, one, or several in a list."""
    if isinstance(value, str) and is_blank(value):
        return []
    if isinstance(value, list):
        return _items(value, key, partial(_text, report=report, hint="give the query's text, or take the item out"))
    text = _text(value, key, report, 'give a query that this negative answers, several in a list, or "" for none')
    return None if text is None else [text]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not is_blank(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
