"""Pages of Markdown: Jinja2 templates, tables by tabulate. A ``|`` in a cell is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

# Control characters but tab and line end, turns of the direction of writing, halves of surrogate pairs.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A pipe table, as wide as its texts (wide characters count two).

    Args:
        headers: one per column.
        rows: cells; numbers get thousands separators.
        numbers: columns that are aligned to the right.
    """
    align = ["right" if column in numbers else "left" for column in range(len(headers))]
    cells = [[_cell(value) for value in row] for row in rows]
    return tabulate(
        cells,
        [_cell(name) for name in headers],
        tablefmt="pipe",
        colalign=align if cells else None,
        disable_numparse=True,
    )


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def printable(text: str) -> str:
    """What others wrote, without characters that act on a terminal: they are written as escapes."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str, length: int = 300) -> str:
    """The beginning of a printable text, on one line."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def literal(text: str) -> str:
    """What others wrote, for a page: no HTML, link, picture or code in it takes effect."""
    shown = " ".join(printable(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`]|\](?=[(\[:]))", r"\\\1", shown)


def code(text: str) -> str:
    """What others wrote as a span of code, between more backticks than it holds."""
    shown = " ".join(printable(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if fence == "`" else f"{fence} {shown} {fence}"


def percent(part: int, whole: int) -> str:
    """``part`` as a share of ``whole``; a dash where there is nothing to share."""
    return f"{100 * part / whole:.2f} %" if whole else "–"


def of(part: int, whole: int) -> str:
    """The number and its share."""
    return f"{part:,} ({percent(part, whole)})"


def render(template: Path, **values: Any) -> str:
    """The page of a template file; in it ``table``, ``percent`` and ``of`` are those of this module."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals.update(table=table, percent=percent, of=of)
    environment.filters.update(number="{:,}".format, literal=literal, code=code)
    return environment.get_template(template.name).render(values)
