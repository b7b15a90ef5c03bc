"""Pages of Markdown: Jinja2 templates, tables by tabulate. A ``|`` in a cell is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


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
    environment.filters["number"] = "{:,}".format
    return environment.get_template(template.name).render(values)
