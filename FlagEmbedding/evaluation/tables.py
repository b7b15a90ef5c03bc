"""What stands in the cells of score tables; ``utils.pages.table`` sets the cells."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from wcwidth import wcwidth


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` columns of a terminal (Hangul and Han take two), on one line, cut with an ellipsis."""
    text = " ".join(text.split())
    ends = list(accumulate(max(0, wcwidth(character)) for character in text))
    if not ends or ends[-1] <= limit:
        return text
    return text[: bisect_right(ends, limit - 1)].rstrip() + "…"


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
