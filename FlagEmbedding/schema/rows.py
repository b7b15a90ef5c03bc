"""The rows of a file, whatever it is: JSON lines, a JSON array, Parquet, a saved dataset, one of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import IO, Any

from FlagEmbedding.schema.problems import Problems, unreadable
from FlagEmbedding.schema.tables import is_table, table_rows
from FlagEmbedding.utils.io import READ_ERRORS, PathLike, decode_line, not_utf8, unpacked
from FlagEmbedding.utils.texts import is_blank

MISSING = object()  # stands for a key that a row lacks


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
            if is_table(path):
                number = 0
                for number, row in table_rows(path, raw):
                    yield number, row
                if not number:
                    problems.report(path, 0, "", "the file is empty", "give at least one row, or remove the file")
                return
            for line, value in _values(path, unpacked(path, raw), problems):
                if isinstance(value, dict):
                    yield line, value
                else:
                    hint = 'write an object: {"query": …, "pos": […], "neg": […]}'
                    problems.report(path, line, "", f"the row is {kind_of(value)}", hint)
    except READ_ERRORS as error:
        problems.add(unreadable(path, error))


def _values(path: str, stream: Iterable[bytes], problems: Problems) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of every line, or of every item where the file is one array."""
    rows = 0
    for number, raw in enumerate(stream, 1):
        text = _decode(path, number, raw, problems)
        if text is None and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return  # UTF-16: every other line would be reported too
        if text is not None and not text.strip():
            continue
        rows += 1
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
        return decode_line(raw)
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        found = f"byte 0x{raw[error.start]:02x} at column {column} is not UTF-8"
        found = "the file is UTF-16" if not_utf8(raw, error) == "UTF-16" else found
        problems.report(path, line, "", found, "save the file as UTF-8")
    except UnicodeError as error:
        problems.report(path, number + raw.count(b"\n", 0, raw.find(b"\0")), "", f"holds {error}", "save it as UTF-8")
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


def kind_of(value: Any) -> str:
    """What ``value`` is, for a message."""
    if value is MISSING:
        return "missing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value!r}"[:60]
    if isinstance(value, str):
        shown = f"{value[:40]!r}…" if len(value) > 40 else repr(value)
        return "empty text" if is_blank(value) else f"the text {shown}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
