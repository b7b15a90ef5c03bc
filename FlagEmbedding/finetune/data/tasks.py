"""Tasks: the sets of rows that batches are drawn from. One file each, small files merged, or everything mixed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.store import StoredFile
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# Upstream's batch sizes for files that split_data_by_length.py names by their longest text in tokens, found by trial
# on 80 GB cards for 8 passages per query, and for 1 (facts of FlagEmbedding 1.2.10, BGE_M3/data.py).
LENGTHS = ("0-500", "500-1000", *(f"{n}000-{n + 1}000" for n in range(1, 7)), "7000-inf")
BATCH_SIZES = {8: (48, 32, 20, 18, 14, 14, 12, 10, 8), 1: (700, 570, 388, 288, 224, 180, 157, 128, 104)}


@dataclass(frozen=True)
class Task:
    """Rows that may share a batch."""

    name: str  # the file, or what was put together
    rows: NDArray[np.int64]  # their numbers in the dataset
    batch_size: int | None = None  # queries a process takes from it at a time, where that differs from the run's


def batch_size_of(path: str, train_group_size: int) -> int | None:
    """The table's batch size for a file named ``…len-0-500.jsonl`` and the like, else None."""
    for length, size in zip(LENGTHS, BATCH_SIZES.get(train_group_size, ()), strict=False):
        if f"len-{length}.jsonl" in Path(path).name:
            return size
    return None


def make_tasks(files: Sequence[StoredFile], starts: Sequence[int], options: DataArguments, seed: int) -> list[Task]:
    """Group the rows of ``files`` (file i holds rows ``starts[i]`` to ``starts[i + 1]``) as ``options`` say.

    Files of fewer than ``small_threshold`` rows are merged folder by folder, and a merged set of fewer than
    ``drop_threshold`` rows is dropped. Without ``same_task_within_batch`` what remains becomes one task.
    """
    parts: dict[str, list[int]] = {}
    for index, stored in enumerate(files):
        small = stored.statistics.rows < options.small_threshold
        # A file can be named twice (to count double), so its place is part of the name of its part.
        parts.setdefault(f"folder {stored.file.folder}" if small else f"file {index}", []).append(index)
    tasks: list[Task] = []
    kept: list[StoredFile] = []
    for name, members in parts.items():
        rows = np.concatenate([_sample(index, starts, options, seed) for index in members])
        merged, title = name.startswith("folder"), files[members[0]].file.path
        if merged and len(rows) < options.drop_threshold:
            logger.warning("%s: dropped, %d rows in its small files (--drop_threshold)", name, len(rows))
            continue
        sizes = [batch_size_of(files[i].file.path, options.train_group_size) for i in members]
        size = min((s for s in sizes if s is not None), default=None) if options.batch_size_by_length else None
        if size is not None:
            logger.info("%s: %d queries per batch by the length table", title, size)
        tasks.append(Task(f"{name} ({len(members)} small files)" if merged else title, rows, size))
        _agree_on_scores([files[i] for i in members], options)
        kept += [files[i] for i in members]
    if options.same_task_within_batch or len(tasks) < 2:
        return tasks
    _agree_on_scores(kept, options)
    return [Task(f"{len(kept)} files, mixed", np.concatenate([task.rows for task in tasks]))]


def _sample(index: int, starts: Sequence[int], options: DataArguments, seed: int) -> NDArray[np.int64]:
    rows = np.arange(starts[index], starts[index + 1])
    most = options.max_example_num_per_dataset
    if most is None or len(rows) <= most:
        return rows
    # Seeded by the file's place, so that files of equal size do not lose the same lines.
    chosen = random.Random(f"{seed}/file {index}").sample(range(len(rows)), most)
    return rows[sorted(chosen)]


def _agree_on_scores(files: Sequence[StoredFile], options: DataArguments) -> None:
    """A batch is distilled as a whole or not at all, so the files it comes from must agree."""
    without = [stored for stored in files if not stored.statistics.scored]
    if options.knowledge_distillation and 0 < len(without) < len(files):
        raise DataError(
            f"{without[0].file.path}: no row has pos_scores and neg_scores, and its batches are shared with files that "
            "do; add them, or draw each batch from one file (--same_task_within_batch True, --small_threshold 0)"
        )
