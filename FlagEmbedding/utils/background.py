"""Work beside the computation: reading before it, writing after it, each on a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetch(source: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate ``source`` in a thread, at most ``depth`` items ahead; its errors surface here, and it stops with us."""
    iterator, pool = iter(source), ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(pool.submit(next, iterator, _END) for _ in range(max(1, depth)))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


class BackgroundWriter:
    """Hands work to one thread and waits only when the work before is not done; errors surface at the next call."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __call__(self, *args: Any) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._call, *args)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if self._pending is not None and kind is None:
                self._pending.result()
        finally:
            self._pool.shutdown(wait=True)
