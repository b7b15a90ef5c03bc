"""Work beside the computation: reading before it, writing after it, each on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def prefetch(source: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate ``source`` in a thread, at most ``depth`` items ahead; its errors surface here, and it stops with us."""
    items: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def feed() -> None:
        try:
            for item in source:
                if not put(item):
                    return
        except BaseException as error:  # noqa: BLE001 — raised again where the items are used
            put(error)
        else:
            put(_END)

    thread = threading.Thread(target=feed, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


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
