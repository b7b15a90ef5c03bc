"""The queries that negatives are mined for, from training rows or from MIRACL's topics and judgements.

Read as a stream; what is held of all of them is which texts answer which query (some hundred bytes per row), so that a
passage that answers a query in one row does not become its negative in another. Training rows are read twice for that:
once to check them and learn the answers, once to mine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from FlagEmbedding.collections.trec import read_qrels, read_topics, relevant
from FlagEmbedding.mining.common.alignment import text_key, text_keys
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.common.rows import parse_pairs
from FlagEmbedding.schema import Problems, TrainRecord, read_rows
from FlagEmbedding.utils.errors import DataError

_OURS = ("query", "pos", "neg", "neg_q", "pos_scores", "neg_scores")


@dataclass(frozen=True)
class Item:
    """One query to mine for.

    Attributes:
        key: names its random stream; the qid, or the row's number.
        query, positives: texts.
        positive_rows: places in the corpus that are judged relevant (MIRACL), in the order of ``positives``.
        judged: keys of texts that answer the query (training rows).
        record: the training row; ``neg`` is empty where the file had none. None for MIRACL.
        others: its columns of other names, which are kept.
    """

    key: str
    query: str
    positives: list[str]
    positive_rows: tuple[int, ...] = ()
    judged: Collection[bytes] = ()
    record: TrainRecord | None = None
    others: dict[str, Any] = field(default_factory=dict)


class Items(Protocol):
    """A sized stream of items that can be read again; ``inputs`` are the files it comes from."""

    inputs: list[Path]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Item]: ...


class TrainingRows:
    """Training files as items. ``neg`` may be missing there; every other rule of the schema holds.

    Attributes:
        negatives: how many all rows have.

    Raises:
        DataError: with every problem of the files, before anything is mined.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.inputs = list(files)
        self._answers: dict[bytes, set[bytes]] = {}
        problems = Problems()
        self.count = self.negatives = 0
        for item in self._read(problems):
            self._answers.setdefault(text_key(item.query), set()).update(text_keys(item.positives))
            self.count += 1
            self.negatives += len(item.record.neg) if item.record else 0
        problems.raise_if_any()
        if not self.count:
            raise DataError(f"{self.inputs[0]}: no training rows in it")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        for item in self._read(Problems()):
            yield replace(item, judged=self._answers.get(text_key(item.query), ()))

    def _read(self, problems: Problems) -> Iterator[Item]:
        number = 0
        for path in self.inputs:
            for line, row in read_rows(path, problems):
                record = parse_pairs(row, str(path), line, problems)
                if record is not None:
                    others = {key: value for key, value in row.items() if key not in _OURS}
                    yield Item(str(number), record.query, record.pos, record=record, others=others)
                number += 1


class JudgedTopics:
    """MIRACL's topics with their relevant passages as items.

    Attributes:
        unanswered: queries that are left out because no passage is judged relevant.
        missing: judged passages that the corpus lacks.
    """

    def __init__(self, topics: Path, qrels: Path, store: PassageStore) -> None:
        self.inputs, self._store = [topics, qrels], store
        positives = {qid: relevant(judged) for qid, judged in read_qrels(qrels).items()}
        rows = store.rows_of({docid for docids in positives.values() for docid in docids})
        self._topics: list[tuple[str, str, tuple[int, ...]]] = []
        self.unanswered = self.missing = 0
        for qid, query in read_topics(topics).items():
            docids = positives.get(qid, [])
            found = tuple(rows[docid] for docid in docids if docid in rows)
            self.missing += len(docids) - len(found)
            if found:
                self._topics.append((qid, query, found))
            else:
                self.unanswered += 1
        if not self._topics:
            raise DataError(f"{qrels}: judges no passage of this corpus relevant to a query of {topics}")

    def __len__(self) -> int:
        return len(self._topics)

    def __iter__(self) -> Iterator[Item]:
        for qid, query, rows in self._topics:
            yield Item(qid, query, [self._store[row] for row in rows], positive_rows=rows)
