"""Reading ahead and writing behind: order, errors, and no thread that stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from FlagEmbedding.utils.background import BackgroundWriter, prefetch


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_items_come_in_order_from_another_thread(depth: int) -> None:
    threads = set()

    def source() -> Iterator[int]:
        for item in range(20):
            threads.add(threading.get_ident())
            yield item

    assert list(prefetch(source(), depth)) == list(range(20))
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(prefetch([], depth)) == []


def test_no_more_is_read_ahead_than_asked() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for item in range(50):
            taken.append(item)
            yield item

    items = prefetch(source(), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) == 4, "one in use and three ahead"
    items.close()


@pytest.mark.parametrize("where", [0, 1, 3])
def test_an_error_of_the_source_comes_after_the_items_before_it(where: int) -> None:
    def source() -> Iterator[int]:
        yield from range(where)
        raise OSError("the file ends here")

    before = threading.active_count()
    found = []
    with pytest.raises(OSError, match="the file ends here"):
        for item in prefetch(source(), 2):
            found.append(item)
    assert found == list(range(where))
    assert threading.active_count() == before


def test_a_consumer_that_leaves_ends_the_thread() -> None:
    before, ended = threading.active_count(), []

    def source() -> Iterator[int]:
        for item in range(10_000):
            time.sleep(0.001)
            yield item
        ended.append(True)

    for item in prefetch(source(), 2):
        if item == 3:
            break
    assert threading.active_count() == before and not ended


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_writers_error_is_never_lost(failing: int) -> None:
    written: list[int] = []

    def write(item: int) -> None:
        time.sleep(0.01)
        if item == failing:
            raise OSError("disk full")
        written.append(item)

    with pytest.raises(OSError, match="disk full"), BackgroundWriter(write) as writer:
        for item in range(3):
            writer(item)
    assert written == list(range(failing))


def test_everything_is_written_when_the_block_ends() -> None:
    written: list[tuple[int, str]] = []

    def write(item: int, name: str) -> None:
        time.sleep(0.05)
        written.append((item, name))

    with BackgroundWriter(write) as writer:
        started = time.monotonic()
        writer(1, "a")
        assert time.monotonic() - started < 0.04, "the first is not waited for"
        writer(2, "b")
    assert written == [(1, "a"), (2, "b")]


def test_the_blocks_own_error_comes_first_and_the_thread_ends() -> None:
    before = threading.active_count()

    def fail(_: int) -> None:
        raise OSError("second")

    with pytest.raises(ValueError, match="first"), BackgroundWriter(fail) as writer:
        writer(1)
        raise ValueError("first")
    assert threading.active_count() == before
