"""Tokenizing ahead of the computation.

A feeder thread pulls windows of texts (reading and unpacking the corpus on the way), has them tokenized, by itself
or by worker processes, and keeps a few finished windows in a bounded queue. Token ids travel as one int32 array per
window: no padding, no per-token Python objects between processes. The order of windows is the order they came in.

Where a fast tokenizer cuts is written into the tokenizer by each call, so calls from several threads take turns.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from FlagEmbedding.utils.background import prefetch

T = TypeVar("T")
_JOB_TEXTS = 256
_TURN = Lock()  # to call a tokenizer, or to start a pool's processes


@dataclass(frozen=True)
class TokenRows:
    """Tokenized texts, end to end: ``ids [T]`` int32 and the token count of each row."""

    ids: np.ndarray
    lengths: list[int]


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenRows:
    """Token ids of each text with its special tokens, cut at ``max_length``; one token at least (of an empty text)."""
    if not texts:
        return TokenRows(np.empty(0, dtype=np.int32), [])
    with _TURN:
        rows = tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    if not all(rows):  # a tokenizer without special tokens makes nothing of an empty text
        nothing = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id or 0
        rows = [row or [nothing] for row in rows]
    ids = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=sum(map(len, rows)))
    return TokenRows(ids, [len(row) for row in rows])


_worker_tokenizer: Any = None


def _start_worker(folder: str, trust_remote_code: bool) -> None:
    from FlagEmbedding.modeling.tokenizer import load_tokenizer

    # One worker a core already; a pool of threads inside each would only get in the way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker_tokenizer  # noqa: PLW0603 — a worker process holds its tokenizer for life
    _worker_tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)


def _work(texts: Sequence[str], max_length: int) -> TokenRows:
    return tokenize(_worker_tokenizer, texts, max_length)


@dataclass(frozen=True)
class Window(Generic[T]):
    """A window of texts after tokenization, with whatever the caller wants to see again beside it."""

    tokens: TokenRows
    extra: T


class TokenizerPool:
    """Tokenizes windows ahead of their use; ``workers=0``: in the feeder thread, else in that many processes."""

    def __init__(self, tokenizer: Any, folder: str, workers: int = 0, trust_remote_code: bool = False) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        self.workers = workers
        self.trust_remote_code = trust_remote_code
        self._executor: Executor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle, which starts workers of its own."""
        return {**self.__dict__, "_executor": None}

    def close(self) -> None:
        """Stop the workers; a later call starts others."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def windows(
        self, source: Iterable[tuple[Sequence[str], T]], max_length: int, depth: int = 2
    ) -> Iterator[Window[T]]:
        """Windows of ``source`` (texts, extra) in order, up to ``depth`` of them finished ahead of the consumer."""
        executor = self._workers()
        if executor is None:
            jobs: Iterable[Window[T]] = (
                Window(tokenize(self.tokenizer, texts, max_length), extra) for texts, extra in source
            )
        else:
            jobs = self._in_workers(executor, source, max_length)
        return prefetch(jobs, depth)

    def _workers(self) -> Executor | None:
        with _TURN:
            if self.workers and self._executor is None:
                # Threads and CUDA do not survive a fork, so workers start afresh.
                self._executor = ProcessPoolExecutor(
                    self.workers, get_context("spawn"), _start_worker, (self.folder, self.trust_remote_code)
                )
            return self._executor

    def _in_workers(
        self, executor: Executor, source: Iterable[tuple[Sequence[str], T]], max_length: int
    ) -> Iterator[Window[T]]:
        waiting: deque[tuple[list[Future[TokenRows]], T]] = deque()
        queued = 0
        for texts, extra in source:
            jobs = [
                executor.submit(_work, list(texts[i : i + _JOB_TEXTS]), max_length)
                for i in range(0, len(texts), _JOB_TEXTS)
            ]
            waiting.append((jobs, extra))
            queued += len(jobs)
            while queued > 2 * self.workers and len(waiting) > 1:
                done, extra = waiting.popleft()
                queued -= len(done)
                yield _join(done, extra)
        for done, extra in waiting:
            yield _join(done, extra)


def _join(jobs: list[Future[TokenRows]], extra: T) -> Window[T]:
    parts = [job.result() for job in jobs]
    ids = np.concatenate([part.ids for part in parts]) if parts else np.empty(0, dtype=np.int32)
    return Window(TokenRows(ids, [n for part in parts for n in part.lengths]), extra)
