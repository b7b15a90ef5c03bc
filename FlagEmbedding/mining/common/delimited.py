"""Lines of CSV and TSV tables with a header. A quote that is never closed is refused instead of swallowing rows.

A record of several lines is one whose text holds line ends, or one whose quote should have been a character of the
text and only closes rows later. Where each of its lines is a whole record by itself, and no other record of the file
spans lines in the proper way, it is the latter.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from FlagEmbedding.schema import Problems
from FlagEmbedding.utils.io import all_lines

_LONGEST = 1 << 24  # characters of a field
_CLOSE = 'close the quote, or double it ("") where it belongs to the text'


class _Counted:
    """The lines of a file, with those that the record at hand took."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._ahead: tuple[int, str] | None = None
        self.number = 0
        self.taken: list[str] = []

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> str:
        self.number, line = self._ahead or next(self._lines)
        self._ahead = None
        self.taken.append(line)
        return line

    def peek(self) -> str | None:
        """The next line; None: there is none."""
        self._ahead = self._ahead or next(self._lines, None)
        return None if self._ahead is None else self._ahead[1]


def table_lines(
    path: Path, delimiter: str, problems: Problems, counts: Counter[str]
) -> Iterator[tuple[int, tuple[str, ...], list[Any]]]:
    """``(line, column names, values)`` of a table; the line is the last one of the record.

    What cannot be read goes to ``problems``; ``counts`` is told how many records ``span`` several lines.
    """
    csv.field_size_limit(_LONGEST)  # the default, 131,072, is less than a long passage
    lines = _Counted(all_lines(path, "triples"))
    reader = csv.reader(
        _plain_first(lines, delimiter) if delimiter == "\t" else lines, delimiter=delimiter, strict=True
    )
    header: tuple[str, ...] | None = None
    doubtful, proper = list[tuple[int, int]](), 0
    while True:
        lines.taken.clear()
        first = lines.number + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            _report(str(path), first, lines, error, problems)
            break
        if values is None:
            break
        if not values:
            continue
        if header is None:
            header = tuple(values)
            continue
        if (taken := len(lines.taken)) > 1:
            whole = all(line.count(delimiter) == len(header) - 1 for line in lines.taken)
            doubtful += [(first, taken)] * whole
            proper += not whole
        yield lines.number, header, values
    counts["span"] += proper + len(doubtful)
    if doubtful and not proper:
        first, taken = doubtful[0]
        found = f"a quote that is opened here is closed {taken - 1} lines below, and each of them is a row by itself"
        problems.report(str(path), first, "", found, _CLOSE)


def _plain_first(lines: _Counted, delimiter: str) -> Iterator[str]:
    """Lines of a TSV, in which most programs quote nothing: a quote that opens a field and does not close it there is
    a character of the text, where the line has the header's columns all the same."""
    columns = 0
    for line in lines:
        fields = line.rstrip("\r\n").split(delimiter)
        columns = columns or len(fields)
        plain = len(lines.taken) == 1 and len(fields) == columns
        if plain and _quoted(fields[-1]) != fields[-1] and (below := lines.peek()) is not None:
            plain = below.count(delimiter) == columns - 1  # otherwise the last text goes on there
        yield delimiter.join(map(_quoted, fields)) + "\n" if plain else line


def _quoted(field: str) -> str:
    if not field.startswith('"'):
        return field
    inner = field[1:-1].replace('""', "")
    if len(field) > 1 and field.endswith('"') and '"' not in inner:
        return field
    doubled = field.replace('"', '""')
    return f'"{doubled}"'


def _report(path: str, first: int, lines: _Counted, error: csv.Error, problems: Problems) -> None:
    if "field larger" in str(error):
        found = f"a field of more than {_LONGEST:,} characters begins here"
        hint = "a quote may be open; otherwise cut the text"
    elif "end of data" in str(error):
        found, hint = f"a quote that is opened here is never closed (the file ends in line {lines.number})", _CLOSE
    elif "expected after" in str(error):
        found, hint = f"a quote that is opened here is followed by text in line {lines.number} ({error})", _CLOSE
    elif "new-line character" in str(error):
        found, hint = "a carriage return ends this line", r"end lines with \n or \r\n"
    else:
        found, hint = f"is no line of the table ({error})", "write one row per line"
    problems.report(path, first, "", found, hint)
