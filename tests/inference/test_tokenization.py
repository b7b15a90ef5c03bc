"""Tokenizing ahead gives the tokenizer's own ids in order, stops with its consumer, and passes errors on."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from FlagEmbedding.inference.tokenization import TokenizerPool, tokenize
from FlagEmbedding.utils.background import BackgroundWriter, prefetch

TEXTS = [f"text number {i} " + "강 " * (i % 17) for i in range(700)]


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_come_in_order_with_the_tokenizers_own_ids(tiny_model_dir: Path, workers: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    pool = TokenizerPool(tokenizer, str(tiny_model_dir), workers)
    source = [(TEXTS[:300], "a"), ([], "b"), (TEXTS[300:301], "c"), (TEXTS[301:], "d")]
    try:
        windows = list(pool.windows(source, max_length=20))
    finally:
        pool.close()
    assert [window.extra for window in windows] == ["a", "b", "c", "d"]
    for (texts, _), window in zip(source, windows, strict=True):
        expected = tokenizer(texts, truncation=True, max_length=20)["input_ids"] if texts else []
        assert window.tokens.lengths == [len(row) for row in expected]
        assert window.tokens.ids.tolist() == [token for row in expected for token in row]


def test_no_text_no_tokens(tiny_model_dir: Path) -> None:
    rows = tokenize(AutoTokenizer.from_pretrained(tiny_model_dir), [], 10)
    assert len(rows.ids) == 0
    assert rows.lengths == []


def test_the_thread_runs_ahead_but_not_far() -> None:
    made: list[int] = []

    def source() -> itertools.chain[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(source(), depth=3)
    assert next(items) == 0
    time.sleep(0.3)
    # One taken, three in the queue, one in the thread's hand.
    assert 2 <= len(made) <= 5
    assert list(items) == list(range(1, 100))


def test_the_thread_stops_when_nobody_asks_any_more() -> None:
    before = threading.active_count()
    items = prefetch(itertools.count(), depth=2)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_errors_of_the_source_surface_where_it_is_used() -> None:
    def source() -> itertools.chain[int]:
        yield 1
        raise RuntimeError("broken file")

    items = prefetch(source(), depth=2)
    assert next(items) == 1
    with pytest.raises(RuntimeError, match="broken file"):
        next(items)


def test_work_behind_keeps_its_order_and_its_errors() -> None:
    done: list[int] = []

    def call(number: int) -> None:
        if number == 3:
            raise RuntimeError("disk full")
        done.append(number)

    with BackgroundWriter(call) as write:
        write(1)
        write(2)
    assert done == [1, 2]
    with pytest.raises(RuntimeError, match="disk full"), BackgroundWriter(call) as write:
        write(3)
    with pytest.raises(RuntimeError, match="disk full"), BackgroundWriter(call) as write:
        write(3)
        write(4)
    assert 4 not in done
