"""The training rows and what is drawn from them: one positive, G − 1 negatives, and the negatives' own queries.

A map-style dataset whose keys are (epoch, row). What an item holds is a function of (seed, epoch, row) alone, so a run
repeats for any number of dataloader workers and processes, and a resumed run sees what the uninterrupted one would.

Choices:

* With teacher scores the drawn negatives are ordered by score, highest first, as published.
* ``shuffle_ratio`` applies to positives and negatives alike. Published, it was meant for the positive only (which
  would give it away) and left an empty text behind.
* ``max_example_num_per_dataset`` samples each file by ``seed``, the same rows every epoch. Whether a file is small is
  decided by all its rows.
* A row's number counts the rows of all files in order, so sampling or merging files does not renumber it.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.store import StoredFile, cache_folder, store_file
from FlagEmbedding.finetune.data.tasks import Task, make_tasks
from FlagEmbedding.row_counts import report_missing_scores
from FlagEmbedding.schema import DataFile, Problems, TrainRecord, find_files
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

Key = tuple[int, int]

SHUFFLED_FROM = 100  # a passage of at most this many characters is never cut


@dataclass(frozen=True)
class PlainTexts:
    """What was drawn, as it stands in the row: no instructions, nothing shuffled."""

    query: str
    positives: list[str]  # all that the row has
    passages: list[str]  # the G that were drawn


@dataclass(frozen=True)
class TrainExample:
    """One drawn row."""

    query: str  # with its instruction
    passages: list[str]  # G texts with their instruction, the positive first
    # For each of the G − 1 negatives the queries it answers: 0 to n, with the queries' instruction unless
    # ``neg_q_instruction`` is off.
    neg_q: list[list[str]] | None
    teacher_scores: list[float] | None  # G scores in the order of ``passages``
    row: str  # ``file:line``
    plain: PlainTexts | None = None


class TrainDataset(Dataset[TrainExample]):
    """All rows that ``--train_data`` names, checked, on disk, drawn by key.

    Args:
        options: which rows, and what is drawn from each.
        seed: of what is drawn.

    Attributes:
        tasks: the sets that batches are drawn from; a sampler's affair.
        epoch: the epoch that a sampler draws next. It lies here because accelerate and the Trainer hand an epoch
            to the dataset in every arrangement of wrapped samplers, resumed and sharded ones included.

    Raises ``DataError``: problems in the files (first 20 and their number), or nothing left to train on.
    """

    def __init__(self, options: DataArguments, seed: int = 42) -> None:
        self.options, self.seed = options, seed
        self.epoch = 0
        self.files = _open_files(options)
        counts = [stored.statistics.rows for stored in self.files]
        self._starts = [0, *np.cumsum(counts).tolist()]
        self.tasks: list[Task] = make_tasks(self.files, self._starts, options, seed)
        if not self.tasks:
            raise DataError(f"--drop_threshold {options.drop_threshold} drops every row of the training data: lower it")
        for task in self.tasks:
            logger.info("training data: %s: %d rows", task.name, len(task.rows))

    def __len__(self) -> int:
        return sum(len(task.rows) for task in self.tasks)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch a sampler of this dataset draws next."""
        self.epoch = epoch

    def replace_files(self, paths: Sequence[PathLike]) -> None:
        """Draw from other files from now on: the rows of file i are those of ``paths[i]``, as many and in that order.

        For negatives that were mined again; call it between epochs. Raises ``DataError``.
        """
        named = [DataFile(str(path), old.file.folder) for path, old in zip(paths, self.files, strict=True)]
        files = _store(named, self.options, Problems())
        for old, new in zip(self.files, files, strict=True):
            if new.statistics.rows != old.statistics.rows:
                raise DataError(f"{new.file.path}: {new.statistics.rows} rows in place of {old.statistics.rows}")
        self.files = files

    def record(self, row: int) -> tuple[StoredFile, TrainRecord]:
        """The row as it stands in its file."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        index = bisect_right(self._starts, row) - 1
        stored = self.files[index]
        return stored, TrainRecord(**stored.table[row - self._starts[index]])

    def __getitem__(self, key: Key) -> TrainExample:
        (epoch, row), options = key, self.options
        stored, record = self.record(row)
        # Seeding by text goes through SHA-512 and is the same on every platform and Python.
        generator = random.Random(f"{self.seed}/{epoch}/{row}")
        positive = generator.randrange(len(record.pos))
        negatives = draw_negatives(len(record.neg), options.train_group_size - 1, generator)
        scores = None
        if options.knowledge_distillation and record.pos_scores is not None and record.neg_scores is not None:
            negatives.sort(key=record.neg_scores.__getitem__, reverse=True)
            scores = [record.pos_scores[positive], *(record.neg_scores[i] for i in negatives)]
        texts = [record.pos[positive], *(record.neg[i] for i in negatives)]
        plain = PlainTexts(record.query, record.pos, texts)
        if options.shuffle_ratio > 0:
            texts = [shuffle_text(text, options.shuffle_ratio, generator) for text in texts]
        prefix, ask = options.passage_instruction_for_retrieval or "", options.query_instruction_for_retrieval or ""
        before = ask if options.neg_q_instruction else ""
        neg_q = record.neg_q and [[before + query for query in record.neg_q[i]] for i in negatives]
        return TrainExample(
            query=ask + record.query,
            passages=[prefix + text for text in texts],
            neg_q=neg_q,
            teacher_scores=scores,
            row=f"{stored.file.path}:{record.line}",
            plain=plain,
        )


def draw_negatives(available: int, wanted: int, generator: random.Random) -> list[int]:
    """``wanted`` of the numbers 0 … ``available`` − 1, without replacement while there are enough.

    With fewer than wanted, they are drawn without replacement from the list repeated ⌈wanted/available⌉ times, so that
    no number comes more often than that.
    """
    repeats = max(1, math.ceil(wanted / available))
    return generator.sample(list(range(available)) * repeats, wanted)


def shuffle_text(text: str, ratio: float, generator: random.Random) -> str:
    """With chance ``ratio``, cut a text of over 100 characters into 3 chunks and join them in random order."""
    if len(text) <= SHUFFLED_FROM or generator.random() >= ratio:
        return text
    size = len(text) // 3 + 1
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    generator.shuffle(chunks)
    return " ".join(chunks)


def _open_files(options: DataArguments) -> list[StoredFile]:
    problems = Problems()
    files = _store(find_files(options.train_data, problems), options, problems)
    if not files:
        raise DataError("--train_data names no path: give at least one folder or file")
    if options.knowledge_distillation and not any(stored.statistics.scored for stored in files):
        raise DataError(
            f"{Path(files[0].file.path)}: --knowledge_distillation needs pos_scores and neg_scores, and no row of the "
            "training data has them; add them, or leave the flag out"
        )
    return files


def _store(named: Sequence[DataFile], options: DataArguments, problems: Problems) -> list[StoredFile]:
    """Open every file, converted where needed. Raises ``DataError``: all their problems and those of before."""
    folder = cache_folder(options.cache_path)
    files = [stored for file in named if (stored := store_file(file, folder, problems)) is not None]
    if options.knowledge_distillation:
        for stored in files:
            report_missing_scores(stored.file, stored.statistics, problems)
    problems.raise_if_any()
    return files
