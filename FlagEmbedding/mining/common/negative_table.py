"""The different negatives of training files, and the queries found for them, in a scratch file on disk.

Memory stays flat: which texts answer which query, the texts that wait for a query, and what was decided about them lie
in one SQLite file, which is made again by every run and deleted at its end. It is a function of the input and the
cached answers, so a killed run needs nothing of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from FlagEmbedding.mining.common.rows import valid_rows
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.schema import Problems, TrainRecord, read_records
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.texts import text_key

_SCHEMA = """
CREATE TABLE real (passage BLOB, place BLOB, query BLOB, text TEXT, PRIMARY KEY (passage, place)) WITHOUT ROWID;
CREATE TABLE waiting (
    id INTEGER PRIMARY KEY, passage BLOB UNIQUE, text TEXT, query TEXT, open INTEGER DEFAULT 1, trial TEXT,
    present INTEGER DEFAULT 0
);
CREATE INDEX still ON waiting (open, id);
CREATE TABLE rejected (id INTEGER, attempt INTEGER, query TEXT, reason TEXT);
CREATE TABLE seen (passage BLOB PRIMARY KEY, source TEXT) WITHOUT ROWID;
"""
_PAGE = 512


@dataclass(frozen=True)
class Waiting:
    """A passage that has no query yet; ``query`` is the one on trial, ``present`` says that the corpus has its text."""

    id: int
    passage: str
    query: str = ""
    present: bool = False


class NegativeTable:
    """See the top of this file. ``seed`` decides which of several real queries a passage gets."""

    def __init__(self, path: Path, seed: int = 42) -> None:
        self._seed = seed
        path.unlink(missing_ok=True)
        self._db = sqlite3.connect(path)
        # Scratch: nothing of it outlives the run, so nothing has to reach the disk in time.
        self._db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;" + _SCHEMA)
        self.path = path

    # ---- real queries ----

    def add_real(self, query: str, positives: Sequence[str]) -> None:
        """Note that ``query`` is a real one that ``positives`` answer."""
        key = text_key(query)
        rows = [(p, self._place(p, key), key, query) for p in map(text_key, positives)]
        self._db.executemany("INSERT OR IGNORE INTO real VALUES (?, ?, ?, ?)", rows)

    def _place(self, passage: bytes, query: bytes) -> bytes:
        # Shuffles the queries of a passage by the seed, whatever order the files have.
        return blake2b(passage + query, digest_size=8, key=str(self._seed).encode()).digest()

    def real(self, passage: str, own_query: str, most: int) -> tuple[list[str], bool]:
        """Up to ``most`` real queries of ``passage`` other than ``own_query``, and whether that one is among them."""
        key, own = text_key(passage), text_key(own_query)
        answered = self._db.execute(
            "SELECT 1 FROM real WHERE passage = ? AND place = ?", (key, self._place(key, own))
        ).fetchone()
        found = self._db.execute(
            "SELECT text FROM real WHERE passage = ? AND query != ? ORDER BY place LIMIT ?", (key, own, most)
        )
        return [text for (text,) in found], answered is not None

    # ---- passages without one ----

    def real_queries(self) -> Iterator[str]:
        """Every real query, once for each of its positives."""
        for (text,) in self._db.execute("SELECT text FROM real"):
            yield text

    def add_waiting(self, passage: str) -> None:
        """A negative without a query; the same text counts once, at its first place."""
        self._db.execute("INSERT OR IGNORE INTO waiting (passage, text) VALUES (?, ?)", (text_key(passage), passage))

    def drop_answered(self) -> None:
        """Take those off the waiting list that a real query is known for: it serves them, or is their row's own."""
        self._db.execute("DELETE FROM waiting WHERE passage IN (SELECT passage FROM real)")

    def note_present(self, passage: str) -> None:
        """Note that the corpus has this text, if it waits for a query."""
        self._db.execute("UPDATE waiting SET present = 1 WHERE passage = ?", (text_key(passage),))

    def mark(self, passage: str, source: str) -> None:
        """Remember where the query of a negative comes from, once per passage."""
        self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (text_key(passage), source))

    def sources(self) -> dict[str, int]:
        """How many different negatives each source serves."""
        return dict(self._db.execute("SELECT source, COUNT(*) FROM seen GROUP BY source"))

    def waiting(self) -> Iterator[Waiting]:
        """The passages without a query, in order; they may be judged while this goes on."""
        yield from self._pages("open = 1")

    def on_trial(self) -> Iterator[Waiting]:
        """Those of them that have a query on trial."""
        yield from self._pages("open = 1 AND trial IS NOT NULL")

    def _pages(self, condition: str) -> Iterator[Waiting]:
        last = 0
        columns = "id, text, trial, present"
        statement = f"SELECT {columns} FROM waiting WHERE {condition} AND id > ? ORDER BY id LIMIT {_PAGE}"
        while page := self._db.execute(statement, (last,)).fetchall():
            for number, text, trial, present in page:
                yield Waiting(number, text, trial or "", bool(present))
            last = page[-1][0]

    def count(self, condition: str = "1") -> int:
        """Rows of the waiting list, of those still open with ``open = 1``."""
        return int(self._db.execute(f"SELECT COUNT(*) FROM waiting WHERE {condition}").fetchone()[0])

    def try_query(self, item: Waiting, query: str) -> None:
        """Put a query on trial."""
        self._db.execute("UPDATE waiting SET trial = ? WHERE id = ?", (query, item.id))

    def accept(self, item: Waiting, query: str) -> None:
        """Give a passage its query."""
        self._db.execute("UPDATE waiting SET query = ?, open = 0, trial = NULL WHERE id = ?", (query, item.id))

    def reject(self, item: Waiting, attempt: int, query: str, reason: str) -> None:
        """Note what was wrong; the passage goes on waiting."""
        self._db.execute("INSERT INTO rejected VALUES (?, ?, ?, ?)", (item.id, attempt, query, reason))
        self._db.execute("UPDATE waiting SET trial = NULL WHERE id = ?", (item.id,))

    def generated(self, passage: str) -> str | None:
        """The query that a model wrote for ``passage``."""
        row = self._db.execute("SELECT query FROM waiting WHERE passage = ?", (text_key(passage),)).fetchone()
        return None if row is None else row[0]

    def rejections(self) -> Iterator[tuple[int, str, int]]:
        """``(attempt, reason, number)`` counts, and through :meth:`listed` the passages behind them."""
        counts = "SELECT attempt, reason, COUNT(*) FROM rejected GROUP BY attempt, reason ORDER BY attempt, reason"
        yield from self._db.execute(counts)

    def listed(self) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
        """Every passage left without a query, with ``(attempt, query, reason)`` of each rejected one."""
        tried = "SELECT attempt, query, reason FROM rejected WHERE id = ? ORDER BY attempt, rowid"
        for item in self.waiting():
            yield item.passage, self._db.execute(tried, (item.id,)).fetchall()

    def close(self) -> None:
        """Delete the file."""
        self._db.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def negative_table(path: Path, seed: int) -> Iterator[NegativeTable]:
    """A table for the length of the block."""
    with clear_disk_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = NegativeTable(path, seed)
    try:
        yield table
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be written ({error}); make room and run the same command again") from error
    finally:
        table.close()


def fill(table: NegativeTable, files: Sequence[Path], more: Sequence[Path], replace: bool) -> int:
    """Read the rows of ``files`` into the table, and the real queries of ``more``; returns the number of rows.

    Raises:
        DataError: with the problems of all files.
    """
    problems, rows = Problems(), 0
    for path in files:
        for record in read_records(path, problems):
            rows += 1
            table.add_real(record.query, record.pos)
            for negative, queries in zip(record.neg, kept_queries(record, replace), strict=True):
                if not queries:
                    table.add_waiting(negative)
    for _, record in valid_rows(more, problems):
        table.add_real(record.query, record.pos)
    problems.raise_if_any()
    table.drop_answered()
    return rows


def kept_queries(record: TrainRecord, replace: bool) -> list[list[str]]:
    """What ``neg_q`` says of each negative; nothing where it is to be replaced or is not there."""
    if replace or record.neg_q is None:
        return [[] for _ in record.neg]
    return record.neg_q
