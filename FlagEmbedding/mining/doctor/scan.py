"""What the doctor finds by reading alone: repeated rows and texts, negatives that are answers, ``neg_q``, lengths.

Two passes over the files: the first learns which text answers which query, the second looks at every row. Texts lie
in one scratch file on disk, each once with the number of its places, and beside them which of them make up a row; so
memory does not grow with the data, and the files are not read again.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.jobs import progress
from FlagEmbedding.mining.common.negative_table import NegativeTable
from FlagEmbedding.mining.common.rows import KeySet, row_key
from FlagEmbedding.mining.doctor.arguments import ReadingArguments
from FlagEmbedding.row_counts import FileStatistics
from FlagEmbedding.schema import Problems, TrainRecord, read_records
from FlagEmbedding.utils.pages import one_line
from FlagEmbedding.utils.texts import text_key

SHOWN = 10
ROLES = {"query": "queries", "pos": "positives", "neg": "negatives", "neg_q": "queries of negatives"}
PAGE = 2_048  # texts read at once; vectors are written, and a report taken up again, by this many

# What a finding is called: what was found, and what to do about it.
FINDINGS = {
    "repeated_row": ("rows that say what an earlier row says", "python -m FlagEmbedding.mining.merge leaves them out"),
    "repeated_query": ("rows whose query an earlier row has", "fine with other positives; in one batch they clash"),
    "repeated_positive": ("positives that stand twice in their row", "take the second one out"),
    "repeated_negative": ("negatives that stand twice in their row", "mine again, or take the second one out"),
    "false_negative": (
        "negatives that answer the query, as this or another row says",
        "take them out, or mine again: hard_negatives never takes a known answer",
    ),
    "same_tokens": (
        "negatives of which the tokenizer makes what it makes of a positive of their row",
        "the model cannot tell them apart: take them out",
    ),
    "negative_is_query": ("negatives that are the text of the query", "take them out"),
    "positive_is_query": ("positives that are the text of the query", "such a row teaches nothing: take it out"),
    "own_query_as_neg_q": (
        "negatives whose neg_q is the row's own query",
        "either the negative answers it (take it out) or the neg_q is wrong",
    ),
    "too_few_negatives": ("rows with fewer negatives than a group needs", "they are repeated to fill it: mine more"),
    "one_sided_scores": ("rows with only one of pos_scores and neg_scores", "give both, or neither"),
}

short = partial(one_line, length=60)


@dataclass
class Finding:
    """How often, and where first: ``file:line`` with the beginning of the text concerned."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass
class FileCounts(FileStatistics):
    """One file in numbers; ``known_answers`` are negatives that another row holds as its positive."""

    positives: int = 0
    queries: int = 0
    known_answers: int = 0

    def observe(self, record: TrainRecord) -> None:
        """Count one row."""
        super().observe(record)
        self.positives += len(record.pos)
        self.queries += sum(map(len, record.neg_q or ()))

    def figures(self) -> dict[str, int]:
        """What the report says of the file."""
        return {
            "rows": self.rows, "positives": self.positives, "negatives": self.negatives,
            "with_query": self.negatives_with_query, "queries": self.queries, "with_scores": self.scored,
            "known_answers": self.known_answers,
        }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row whose texts are numbers in :class:`Texts`; ``neg_q`` are pairs of a place in ``neg`` and a text."""

    place: str
    query: int
    pos: list[int]
    neg: list[int]
    neg_q: list[tuple[int, int]]


class Texts:
    """Every different text of a role, with the number of its places, in a scratch file; and the rows they make up."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._db = sqlite3.connect(path)
        self.close = self._db.close
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;"
            "CREATE TABLE texts (id INTEGER PRIMARY KEY, key BLOB UNIQUE, role TEXT, text TEXT, places INTEGER);"
            "CREATE TABLE rows (place TEXT, parts TEXT)"
        )

    def add_row(self, place: str, record: TrainRecord) -> None:
        """Count the texts of a row, and note the row."""
        parts = (
            self._add("query", record.query),
            [self._add("pos", text) for text in record.pos],
            [self._add("neg", text) for text in record.neg],
            [(i, self._add("neg_q", q)) for i, queries in enumerate(record.neg_q or ()) for q in queries],
        )
        self._db.execute("INSERT INTO rows VALUES (?, ?)", (place, json.dumps(parts)))

    def _add(self, role: str, text: str) -> int:
        """Count one place of ``text``; returns its number, from 0, in the order the texts came."""
        key = blake2b(f"{role}\0{text}".encode(), digest_size=16).digest()
        found = self._db.execute(
            "INSERT INTO texts (key, role, text, places) VALUES (?, ?, ?, 1) "
            "ON CONFLICT (key) DO UPDATE SET places = places + 1 RETURNING id",
            (key, role, text),
        )
        return int(found.fetchone()[0]) - 1

    def rows(self) -> Iterator[Row]:
        """The rows, in the order they came."""
        for place, parts in self._db.execute("SELECT place, parts FROM rows ORDER BY rowid"):
            yield Row(place, *json.loads(parts))

    def text(self, number: int) -> str:
        """A text by its number."""
        return str(self._db.execute("SELECT text FROM texts WHERE id = ?", (number + 1,)).fetchone()[0])

    def __len__(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM texts").fetchone()[0])

    def pages(self, first: int = 0) -> Iterator[list[tuple[str, str, int]]]:
        """``(role, text, places)`` of all texts from number ``first`` on, ``PAGE`` at a time."""
        statement = "SELECT role, text, places FROM texts WHERE id > ? ORDER BY id LIMIT ?"
        while page := self._db.execute(statement, (first, PAGE)).fetchall():
            yield page
            first += len(page)


@dataclass
class Scan:
    """What reading found; ``texts`` are those of the rows that are looked at more closely, ``sampled`` which (all)."""

    files: dict[str, FileCounts]
    findings: dict[str, Finding]
    texts: Texts
    sampled: set[int] | None


def scan(files: Sequence[Path], problems: Problems, work: Path, reading: ReadingArguments) -> Scan:
    """Read ``files``, count, and collect the texts of all rows, or of ``sample_rows`` drawn by ``seed``.

    What cannot be read goes to ``problems``.
    """

    def records(problems: Problems) -> Iterator[tuple[str, TrainRecord]]:
        return ((str(path), record) for path in files for record in read_records(path, problems))

    answers, total, sample = NegativeTable(work / "answers", reading.seed), 0, reading.sample_rows
    for _, record in records(problems):
        answers.add_real(record.query, record.pos)
        total += 1
    # Seeding by text goes through SHA-512, the same on every platform.
    drawn = set(random.Random(f"{reading.seed}").sample(range(total), sample)) if 0 < sample < total else None
    found = Scan({}, {name: Finding() for name in FINDINGS if name != "same_tokens"}, Texts(work / "texts"), drawn)
    rows, queries = KeySet(), KeySet()
    for number, (path, record) in enumerate(progress("reading", records(Problems()), total=total)):
        counts, place = found.files.setdefault(path, FileCounts()), f"{path}:{record.line}"
        _look_at(record, place, found.findings, answers, counts, reading.train_group_size)
        if not rows.add(row_key(record)):
            found.findings["repeated_row"].add(f"{place}: {short(record.query)}")
        if not queries.add(text_key(record.query)):
            found.findings["repeated_query"].add(f"{place}: {short(record.query)}")
        if drawn is None or number in drawn:
            found.texts.add_row(place, record)
    answers.close()
    return found


def _look_at(
    record: TrainRecord, place: str, findings: dict[str, Finding], answers: NegativeTable, counts: FileCounts,
    group: int | None,
) -> None:  # fmt: skip
    own = text_key(record.query)
    counts.observe(record)
    if (record.pos_scores is None) != (record.neg_scores is None):
        findings["one_sided_scores"].add(place)
    if group is not None and len(record.neg) < group - 1:
        findings["too_few_negatives"].add(f"{place}: {len(record.neg)} of {group - 1}")
    for kind, column, texts in (("positive", "pos", record.pos), ("negative", "neg", record.neg)):
        seen: set[bytes] = set()
        for i, text in enumerate(texts):
            this = text_key(text)
            if this in seen:
                findings[f"repeated_{kind}"].add(f"{place}: {column}[{i}] {short(text)}")
            if this == own:
                findings[f"{kind}_is_query"].add(f"{place}: {column}[{i}]")
            seen.add(this)
    for i, text in enumerate(record.neg):
        others, answers_own = answers.real(text, record.query, 1)
        counts.known_answers += bool(others)
        if answers_own:
            findings["false_negative"].add(f"{place}: neg[{i}] {short(text)}")
    for i, asked in enumerate(record.neg_q or ()):
        if own in map(text_key, asked):
            findings["own_query_as_neg_q"].add(f"{place}: neg_q[{i}] {short(record.query)}")


def lengths(texts: Texts, tokenizer: Any | None) -> dict[str, Counter[int]]:
    """How many places have texts of how many tokens (characters without a tokenizer), by role. Nothing is cut off."""
    found = {role: Counter[int]() for role in ROLES}
    for page in progress("counting tokens, pages", texts.pages()):
        units = [text for _, text, _ in page]
        if tokenizer is not None:
            options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            units = tokenizer(units, **options)["input_ids"]
        for (role, _, places), unit in zip(page, units, strict=True):
            found[role][len(unit)] += places
    return found
