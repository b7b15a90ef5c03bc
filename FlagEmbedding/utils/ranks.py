"""Windows of ranks as the command lines write them."""

from __future__ import annotations

from FlagEmbedding.utils.errors import UsageError


def parse_range(text: str) -> tuple[int, int]:
    """``2-30`` as (2, 30). Raises ``UsageError``."""
    first, _, last = text.partition("-")
    if not (first.strip().isdigit() and last.strip().isdigit()) or int(first) >= int(last):
        raise UsageError(f"range_for_sampling {text!r}: give two ranks such as 2-30, the first below the second")
    return int(first), int(last)
