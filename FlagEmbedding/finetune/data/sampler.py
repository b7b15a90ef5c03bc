"""Batches for all processes: lists of (epoch, row) keys, a pure function of (seed, epoch).

What a step of the whole run holds does not depend on how it is divided: batch size 8 on one process and 4 on two give
the same steps (up to a task's remainder).

The batches of process 0, 1, … of one step come after each other, always for every process and all from one task;
accelerate's ``BatchSamplerShard`` gives process i the batches i, i + world, …: at each step every process works on the
same file, and none runs out before the others. As published, each epoch leaves out what remains of a task when fewer
than 2 × processes rows are left (other rows every epoch); a remainder above that becomes smaller batches, equal on all
processes, unless ``drop_last``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from FlagEmbedding.finetune.data.dataset import Key, TrainDataset
from FlagEmbedding.finetune.data.tasks import Task
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


class TaskBatchSampler(Sampler[list[Key]]):
    """Batches of keys for a ``TrainDataset``.

    Args:
        dataset: gives the tasks and holds the epoch.
        batch_size: queries a process takes at a time (``per_device_train_batch_size``).
        seed: of the order.
        num_processes: data-parallel processes of the run.
        drop_last: leave out the smaller batches at the end of a task.
        per_step: batches of an optimizer step of all processes, under ``--global_batch_size``: an epoch is then whole
            steps, and what they hold does not depend on the number of processes. Without shared negatives
            ``num_processes`` is 1, whatever their number: a step's batches are dealt out to them.

    Raises ``DataError`` where the rows do not make a single batch.
    """

    def __init__(
        self, dataset: TrainDataset, *, batch_size: int, seed: int, num_processes: int = 1, drop_last: bool = False,
        per_step: int | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.seed, self.num_processes, self.per_step = dataset, seed, num_processes, per_step
        # For accelerate: there is never a batch that some process lacks, so nothing to even out. There is no
        # attribute batch_size, which would promise that all batches have it.
        self.drop_last = True
        self._steps: list[list[tuple[int, int]]] = []  # of each task: first row and rows per process
        self._slots: list[int] = []  # of each task: steps it would have, were no remainder left out
        for task in dataset.tasks:
            size = task.batch_size or batch_size
            if per_step is not None and num_processes > 1:
                whole = plan_steps(len(task.rows), size * num_processes, 1, drop_last=True)
                steps = [(start, size) for start, _ in whole]
            else:
                steps = plan_steps(len(task.rows), size, num_processes, drop_last)
            if not steps:
                logger.warning("%s: its %s make no batch and are left out", task.name, _rows(task))
            self._steps.append(steps)
            self._slots.append(math.ceil(len(task.rows) / (size * num_processes)))
        if not any(self._steps):
            needed = max(2, batch_size if drop_last else 0) * num_processes
            raise DataError(
                f"no batch can be made: {dataset.tasks[0].name} holds {_rows(dataset.tasks[0])}, a step of batch size "
                f"{batch_size} on {num_processes} process(es) needs {needed}; add rows, lower "
                "--per_device_train_batch_size, or mix the files (--same_task_within_batch False)"
            )
        if len(self) == 0:
            batches = sum(map(len, self._steps)) * num_processes
            raise DataError(
                f"--global_batch_size: the training data makes {batches} batches, a step takes {per_step}; add "
                "rows, or lower it"
            )

    def plan_digest(self, shared: bool) -> str:
        """SHA-256 over which rows make which batches, whatever the epoch.

        Args:
            shared: the queries of all processes share their negatives, so how a step's are divided changes no loss.
        """
        world = self.num_processes
        plan = [[(start, size * world if shared else (size, world)) for start, size in steps] for steps in self._steps]
        rows = [hashlib.sha256(task.rows.astype("<i8").tobytes()).hexdigest() for task in self.dataset.tasks]
        return digest(plan, self._slots, rows, self.per_step and self.per_step // world)[:32]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration draws."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        batches = sum(map(len, self._steps)) * self.num_processes
        return batches if self.per_step is None else batches - batches % self.per_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.dataset.epoch
        # RandomState is the kind whose stream numpy promises never to change.
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed % 2**32, epoch])))
        rows: list[NDArray[np.int64]] = []
        order: list[tuple[float, int, int]] = []
        for index, task in enumerate(self.dataset.tasks):
            rows.append(task.rows[generator.permutation(len(task.rows))])
            # One place for every slot, used or not: a remainder that another number of processes would leave out
            # does not change the order of the rest.
            places = generator.random_sample(self._slots[index])
            order += [(places[step], index, step) for step in range(len(self._steps[index]))]
        for _, index, step in sorted(order)[: len(self) // self.num_processes]:
            start, size = self._steps[index][step]
            for first in range(start, start + self.num_processes * size, size):
                yield [(epoch, int(row)) for row in rows[index][first : first + size]]


def plan_steps(rows: int, batch_size: int, num_processes: int, drop_last: bool) -> list[tuple[int, int]]:
    """(first row, rows per process) of every step that ``rows`` rows make."""
    steps = []
    for start in range(0, rows, batch_size * num_processes):
        left = rows - start
        if left < 2 * num_processes:
            break
        size = min(batch_size, left // num_processes)
        if size == batch_size or not drop_last:
            steps.append((start, size))
    return steps


def _rows(task: Task) -> str:
    return "1 row" if len(task.rows) == 1 else f"{len(task.rows)} rows"
