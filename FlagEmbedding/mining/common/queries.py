"""The queries that negatives are mined for, from training rows or from MIRACL's topics and judgments.

Read as a stream; what is held of all of them is which texts answer which query (some hundred bytes per row), so that a
passage that answers a query in one row does not become its negative in another. Training rows are read twice for that:
once to check them and learn the answers, once to mine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import relevant
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.common.rows import valid_rows
from FlagEmbedding.schema import Problems, TrainRecord
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.texts import text_key, text_keys

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


class TrainingRows:
    """Training files as items. ``neg`` may be missing there; every other rule of the schema holds.

    Attributes:
        negatives: how many all rows have.

    Raises:
        DataError: with every problem of the files, before anything is mined.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.inputs, self.skipped = list(files), dict[str, int]()
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
        for number, (row, record) in enumerate(valid_rows(self.inputs, problems)):
            others = {key: value for key, value in row.items() if key not in _OURS}
            yield Item(str(number), record.query, record.pos, record=record, others=others)


class JudgedTopics:
    """Judged topics (MIRACL's, BEIR's) with their relevant passages as items.

    Attributes:
        skipped: for the report, what could not be used and how much of it.
    """

    def __init__(self, source: Source, store: PassageStore) -> None:
        topics, qrels = self.inputs = [source.topics_file(), source.qrels_file()]
        self._store = store
        positives = {qid: relevant(judged) for qid, judged in source.qrels().items()}
        rows = store.rows_of({docid for docids in positives.values() for docid in docids})
        queries = source.topics()
        answers = {qid: tuple(rows[docid] for docid in positives.get(qid, ()) if docid in rows) for qid in queries}
        self._topics = [(qid, query, answers[qid]) for qid, query in queries.items() if answers[qid]]
        if not self._topics:
            raise DataError(f"{qrels}: judges no passage of this corpus relevant to a query of {topics}")
        asked = sum(len(positives.get(qid, ())) for qid in queries)
        self.skipped = {
            "topics left out: no relevant passage": len(queries) - len(self._topics),
            "relevant passages that the corpus lacks": asked - sum(map(len, answers.values())),
        }

    def __len__(self) -> int:
        return len(self._topics)

    def __iter__(self) -> Iterator[Item]:
        for qid, query, rows in self._topics:
            yield Item(qid, query, [self._store[row] for row in rows], positive_rows=rows)


Items = TrainingRows | JudgedTopics
