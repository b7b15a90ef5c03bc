"""Progress of long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(what: str, items: Iterable[T] = (), *, total: int | None = None, done: int = 0) -> tqdm[T]:
    """``items`` with a bar on a terminal, elsewhere a line every ten seconds; none for what takes less."""
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        items, what, total, initial=done, mininterval=seconds, miniters=1, delay=seconds, leave=False,
        dynamic_ncols=True, unit_scale=True,
    )  # fmt: skip
