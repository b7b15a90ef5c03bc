"""Markdown tables that also read well in a terminal: padded by display width (Hangul and Han take two columns)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; ``align`` has one of ``l``, ``r``, ``c`` a column. Cells may hold any text."""
    cells = [[_clean(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(width(row[column]) for row in cells)) for column in range(len(header))]
    rule = {"l": lambda n: "-" * n, "r": lambda n: "-" * (n - 1) + ":", "c": lambda n: ":" + "-" * (n - 2) + ":"}
    lines = [_line(cells[0], widths, align)]
    lines.append("| " + " | ".join(rule[a](n) for a, n in zip(align, widths, strict=True)) + " |")
    lines += [_line(row, widths, align) for row in cells[1:]]
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = []
    for cell, size, side in zip(row, widths, align, strict=True):
        room = size - width(cell)
        left = {"l": 0, "r": room, "c": room // 2}[side]
        padded.append(" " * left + cell + " " * (room - left))
    return "| " + " | ".join(padded) + " |"


def _clean(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def width(text: str) -> int:
    """Columns of a terminal that ``text`` takes."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Mn") else
        2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )  # fmt: skip


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` columns of ``text``, on one line, cut with an ellipsis."""
    text = " ".join(text.split())
    if width(text) <= limit:
        return text
    kept = ""
    for character in text:
        if width(kept + character) > limit - 1:
            break
        kept += character
    return kept.rstrip() + "…"


def points(value: float) -> str:
    """A score of 0 to 1 as it stands in tables: × 100, one decimal."""
    return f"{100 * value:.1f}"


def signed_points(value: float) -> str:
    """A difference of scores × 100, with its sign; a plain 0.0 when it rounds to nothing."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_text(p: float) -> str:
    """``<0.001`` or three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
