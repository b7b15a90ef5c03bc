"""What a language model has answered, on disk: nothing is paid for twice, and a kill loses no answer that has come.

One SQLite file. An answer is filed under (model, prompt with its passage, attempt) and is safe once :meth:`put` returns
(one committed transaction). Sampling options are not part of the name: an answer that is there is used whatever the
temperature. Ranks found by the round trip and the requests sent by a job that is under way lie beside the answers.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.utils.errors import DataError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ranks (key TEXT PRIMARY KEY, rank INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (job TEXT PRIMARY KEY, requests INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Task:
    """One question: ``key`` names it in the cache, ``prompt`` is the whole message."""

    key: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """``text`` as it came; ``finish`` is the protocol's reason for its end ('stop', 'length', …)."""

    text: str
    finish: str = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class AnswerCache:
    """The file at ``path``; threads may share it. Raises ``DataError`` where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self.path}: cannot be used as a cache of answers ({error}); what it holds is kept: make room, or "
                "name another --cache"
            ) from error

    def _write(self, statement: str, *rows: tuple[Any, ...]) -> int:
        """Run ``statement`` for all rows or for none; returns how many rows of the file it changed."""
        with self._guarded(), self._db:
            return self._db.executemany(statement, rows).rowcount

    def _one(self, statement: str, key: str) -> Any:
        with self._guarded():
            return self._db.execute(statement, (key,)).fetchone()

    def get(self, key: str) -> Answer | None:
        """The answer filed under ``key``."""
        row = self._one("SELECT text, finish, prompt_tokens, completion_tokens FROM answers WHERE key = ?", key)
        return None if row is None else Answer(*row)

    def put(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """File some answers, all or none of them; the first answer to a key stays."""
        rows = [(k, _storable(a.text), _storable(a.finish), a.prompt_tokens, a.completion_tokens) for k, a in answers]
        self._write("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", *rows)

    def rank(self, key: str) -> int | None:
        """A rank filed before; 0 stands for not found."""
        row = self._one("SELECT rank FROM ranks WHERE key = ?", key)
        return None if row is None else int(row[0])

    def put_ranks(self, ranks: Sequence[tuple[str, int]]) -> None:
        """File some ranks."""
        self._write("INSERT OR REPLACE INTO ranks VALUES (?, ?)", *ranks)

    def spent(self, job: str) -> int:
        """Requests that ``job`` has sent, earlier runs that were killed included."""
        row = self._one("SELECT requests FROM spent WHERE job = ?", job)
        return 0 if row is None else int(row[0])

    def spend(self, job: str, limit: int | None) -> bool:
        """Count one more request of ``job``, before it is sent; False where that would pass ``limit``."""
        statement = (
            "INSERT INTO spent SELECT ?1, 1 WHERE ?2 > 0 "
            "ON CONFLICT (job) DO UPDATE SET requests = requests + 1 WHERE requests < ?2"
        )
        return self._write(statement, (job, 2**62 if limit is None else limit)) == 1

    def settle(self, job: str) -> None:
        """Forget the count of a job that is finished."""
        self._write("DELETE FROM spent WHERE job = ?", (job,))

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def _storable(text: str) -> str:
    # A model may send half a surrogate pair, which SQLite cannot hold.
    return text.encode("utf-8", "replace").decode("utf-8")
