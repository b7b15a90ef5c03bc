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
from hashlib import blake2b
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.mining.common.jobs import progress
from FlagEmbedding.mining.common.negative_table import NegativeTable
from FlagEmbedding.mining.common.rows import KeySet, row_key
from FlagEmbedding.mining.doctor.arguments import ReadingArguments
from FlagEmbedding.row_counts import FileStatistics
from FlagEmbedding.schema import Problems, TrainRecord, read_records

SHOWN = 10
ROLES = ("query", "pos", "neg", "neg_q")
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
    "negative_is_query": ("negatives that are the text of the query", "take them out"),
    "positive_is_query": ("positives that are the text of the query", "such a row teaches nothing: take it out"),
    "own_query_as_neg_q": (
        "negatives whose neg_q is the row's own query",
        "either the negative answers it (take it out) or the neg_q is wrong",
    ),
    "too_few_negatives": ("rows with fewer negatives than a group needs", "they are repeated to fill it: mine more"),
    "one_sided_scores": ("rows with only one of pos_scores and neg_scores", "give both, or neither"),
}


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
        found = self._db.execute(
            "INSERT INTO texts (key, role, text, places) VALUES (?, ?, ?, 1) "
            "ON CONFLICT (key) DO UPDATE SET places = places + 1 RETURNING id",
            (_key(role, text), role, text),
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
        while page := self._db.execute(
            "SELECT role, text, places FROM texts WHERE id > ? ORDER BY id LIMIT ?", (first, PAGE)
        ).fetchall():
            yield page
            first += len(page)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


def _key(role: str, text: str) -> bytes:
    return blake2b(f"{role}\0{text}".encode(), digest_size=16).digest()


@dataclass
class Scan:
    """What reading found; ``texts`` are those of the rows that are looked at more closely."""

    problems: Problems
    files: dict[str, FileCounts]
    findings: dict[str, Finding]
    texts: Texts
    sampled: set[int] | None

    @property
    def rows(self) -> int:
        """Valid rows of all files."""
        return sum(counts.rows for counts in self.files.values())


def valid_records(files: Sequence[Path], problems: Problems) -> Iterator[tuple[Path, TrainRecord]]:
    """Every valid row; the others go to ``problems``."""
    for path in files:
        for record in read_records(path, problems):
            yield path, record


def scan(files: Sequence[Path], problems: Problems, work: Path, reading: ReadingArguments) -> Scan:
    """Read ``files``, count, and collect the texts of all rows, or of ``sample_rows`` drawn by ``seed``."""
    answers, total, sample = NegativeTable(work / "answers", reading.seed), 0, reading.sample_rows
    for _, record in valid_records(files, problems):
        answers.add_real(record.query, record.pos)
        total += 1
    # Seeding by text goes through SHA-512, the same on every platform.
    drawn = set(random.Random(f"{reading.seed}").sample(range(total), sample)) if 0 < sample < total else None
    found = Scan(problems, {}, {name: Finding() for name in FINDINGS}, Texts(work / "texts"), drawn)
    rows, queries = KeySet(), KeySet()
    again = progress("reading", valid_records(files, Problems()), total=total)
    for number, (path, record) in enumerate(again):
        counts, place = found.files.setdefault(str(path), FileCounts()), f"{path}:{record.line}"
        _look_at(record, place, found.findings, answers, counts, reading.train_group_size)
        for name, seen, key in (
            ("repeated_row", rows, row_key(record)),
            ("repeated_query", queries, text_key(record.query)),
        ):
            if not seen.add(key):
                found.findings[name].add(f"{place}: {short(record.query)}")
        if drawn is None or number in drawn:
            found.texts.add_row(place, record)
    answers.close()
    return found


def _look_at(
    record: TrainRecord, place: str, findings: dict[str, Finding], answers: NegativeTable, counts: FileCounts,
    group: int | None,
) -> None:  # fmt: skip
    own, neg_q = text_key(record.query), record.neg_q or [[] for _ in record.neg]
    counts.observe(record)
    if (record.pos_scores is None) != (record.neg_scores is None):
        findings["one_sided_scores"].add(place)
    if group is not None and len(record.neg) < group - 1:
        findings["too_few_negatives"].add(f"{place}: {len(record.neg)} of {group - 1}")
    seen: set[bytes] = set()
    for i, text in enumerate(record.pos):
        _repeated("positive", text, f"{place}: pos[{i}]", own, seen, findings)
    seen = set()
    for i, (text, queries) in enumerate(zip(record.neg, neg_q, strict=True)):
        where = f"{place}: neg[{i}]"
        _repeated("negative", text, where, own, seen, findings)
        others, answers_own = answers.real(text, record.query, 1)
        counts.known_answers += bool(others)
        if answers_own:
            findings["false_negative"].add(f"{where} {short(text)}")
        if own in map(text_key, queries):
            findings["own_query_as_neg_q"].add(f"{place}: neg_q[{i}] {short(record.query)}")


def _repeated(kind: str, text: str, where: str, own: bytes, seen: set[bytes], findings: dict[str, Finding]) -> None:
    key = text_key(text)
    if key in seen:
        findings[f"repeated_{kind}"].add(f"{where} {short(text)}")
    seen.add(key)
    if key == own:
        findings[f"{kind}_is_query"].add(where)


def short(text: str, length: int = 60) -> str:
    """The beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def lengths(texts: Texts, tokenizer: Any | None) -> dict[str, Counter[int]]:
    """How many places have texts of how many tokens (characters without a tokenizer), by role. Nothing is cut off."""
    found = {role: Counter[int]() for role in ROLES}
    for page in progress("counting tokens, pages", texts.pages()):
        if tokenizer is None:
            sizes = [len(text) for _, text, _ in page]
        else:
            encoded = tokenizer(
                [text for _, text, _ in page], return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
            sizes = [len(ids) for ids in encoded["input_ids"]]
        for (role, _, places), size in zip(page, sizes, strict=True):
            found[role][size] += places
    return found
