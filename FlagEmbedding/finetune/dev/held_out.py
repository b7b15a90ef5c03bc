"""Training rows that are held out: never trained on, and searched for in a pool of passages of the training rows.

The rows are drawn by seed, and with each every other row of the same query. Their positives are what is relevant; the
pool is their positives and negatives, and passages of the other rows at random. It is written as a collection in
MIRACL's layout.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import Qrels, Topics
from FlagEmbedding.collections.writing import write_collection
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.dev.arguments import EvaluationArguments
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main

logger = get_logger(__name__)

NAME = "rows"  # of the collection


def hold_out(dataset: TrainDataset, options: EvaluationArguments, folder: Path) -> Source:
    """Take rows out of ``dataset``'s tasks and write them as a collection below ``folder`` (main process).

    Call it before a sampler is made, from every process.

    Raises:
        DataError: nothing would be left to train on.
    """
    every = np.sort(np.concatenate([task.rows for task in dataset.tasks]))
    asked = options.eval_rows or 0
    count = max(1, round(asked * len(every))) if asked < 1 else int(asked)
    rows = every.tolist()
    asks = [query for stored in dataset.files for query in stored.table.data.column("query").to_pylist()]  # by row
    drawn = random.Random(f"{dataset.seed}/held out").sample(rows, min(count, len(rows)))
    queries = {asks[row] for row in drawn}
    held = {row for row in rows if asks[row] in queries}
    tasks = [replace(task, rows=task.rows[~np.isin(task.rows, sorted(held))]) for task in dataset.tasks]
    dataset.tasks = [task for task in tasks if len(task.rows)]
    if not dataset.tasks:
        raise DataError(f"--eval_rows {asked:g} holds out all {len(rows)} training rows: give fewer")
    said = "%d of %d training rows are held out for evaluation: %d queries"
    logger.info(said, len(held), len(rows), len(queries))
    return on_main(lambda: _write(dataset, sorted(held), folder, options.eval_pool_random))


def _write(dataset: TrainDataset, held: list[int], folder: Path, at_random: int) -> Source:
    topics: Topics = {}
    qrels: Qrels = {}
    pool: dict[str, str] = {}  # docid -> text
    for row in held:
        record = dataset.record(row)[1]
        qid = f"q{_name(record.query)}"
        topics[qid] = record.query
        for text in (*record.pos, *record.neg):
            pool[_name(text)] = text
        qrels.setdefault(qid, {}).update({_name(text): 1 for text in record.pos})
    for text in _at_random(dataset, set(pool), at_random):
        pool[_name(text)] = text
    logger.info("the pool holds %d passages for %d held-out queries", len(pool), len(topics))
    return write_collection(folder, NAME, ((docid, "", text) for docid, text in pool.items()), topics, qrels)


def _at_random(dataset: TrainDataset, known: set[str], count: int) -> Iterator[str]:
    """``count`` passages of the training rows that are not ``known`` by name; few rows are read for few passages."""
    rows = [int(row) for task in dataset.tasks for row in task.rows]
    random.Random(f"{dataset.seed}/pool").shuffle(rows)
    left = count
    for row in rows:
        record = dataset.record(row)[1]
        for text in (*record.pos, *record.neg):
            if left <= 0:
                return
            if _name(text) not in known:
                known.add(_name(text))
                left -= 1
                yield text


def _name(text: str) -> str:
    """An id by content: equal passages are one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
