"""Batches for all processes: the published remainder rule, one file a step, epochs, and accelerate's wrappers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from finetune.helpers import opened
from torch.utils.data import DataLoader

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import Key, TrainDataset, TrainExample
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler, plan_steps
from FlagEmbedding.utils.errors import DataError

COUNTS = {"a": 37, "b": 16, "c": 5, "d": 1}


def write_rows(path: Path, rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f'{{"query": "{path.stem} {i}", "pos": "p{i}", "neg": ["n", "m"]}}\n' for i in range(rows)))


@pytest.fixture
def dataset(tmp_path: Path) -> TrainDataset:
    for name, rows in COUNTS.items():
        write_rows(tmp_path / f"train/{name}.jsonl", rows)
    config = DataArguments([], train_group_size=2, same_task_within_batch=True, cache_path=str(tmp_path / "cache"))
    return opened([tmp_path / "train"], config)


def mixed(dataset: TrainDataset, tmp_path: Path) -> TrainDataset:
    return opened([tmp_path / "train"], replace(dataset.options, same_task_within_batch=False))


def file_of(dataset: TrainDataset, key: Key) -> str:
    return Path(dataset.record(key[1])[0].file.path).stem


def published_steps(rows: int, batch: int, processes: int) -> list[int]:
    """Rows a process at each step, by the loop of FlagEmbedding 1.2.10: slices of an epoch's permutation."""
    sizes = []
    permutation = list(range(rows))
    while permutation:
        if len(permutation) < 2 * processes:
            break
        step, permutation = permutation[: batch * processes], permutation[batch * processes :]
        sizes.append(int(len(step) / processes))
    return sizes


@pytest.mark.parametrize(("batch", "processes"), itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 4]))
def test_steps_are_the_published_ones(batch: int, processes: int) -> None:
    for rows in range(60):
        steps = plan_steps(rows, batch, processes, drop_last=False)
        assert [size for _, size in steps] == published_steps(rows, batch, processes)
        assert [start for start, _ in steps] == [i * batch * processes for i in range(len(steps))]
        full = plan_steps(rows, batch, processes, drop_last=True)
        assert full == [step for step in steps if step[1] == batch]


@pytest.mark.parametrize(("batch", "processes", "drop_last"), itertools.product([1, 3, 4], [1, 2, 3], [False, True]))
def test_an_epoch(dataset: TrainDataset, batch: int, processes: int, drop_last: bool) -> None:
    sampler = TaskBatchSampler(dataset, batch_size=batch, seed=5, num_processes=processes, drop_last=drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert len(batches) % processes == 0
    keys = [key for one in batches for key in one]
    assert len(set(keys)) == len(keys), "no row twice in an epoch"
    assert {epoch for epoch, _ in keys} == {0}
    for step in range(0, len(batches), processes):
        together = batches[step : step + processes]
        assert len({len(one) for one in together}) == 1, "equal on all processes"
        assert len({file_of(dataset, key) for one in together for key in one}) == 1, "one file"
    drawn = {name: sum(file_of(dataset, key) == name for key in keys) for name in COUNTS}
    for name, rows in COUNTS.items():
        sizes = [size for size in published_steps(rows, batch, processes) if size == batch or not drop_last]
        assert drawn[name] == sum(sizes) * processes, name


def test_mixed_batches_take_every_file(dataset: TrainDataset, tmp_path: Path) -> None:
    every = mixed(dataset, tmp_path)
    batches = list(TaskBatchSampler(every, batch_size=8, seed=5))
    assert sorted(row for one in batches for _, row in one) == list(range(59)), "59 = 7 x 8 + 3, and 3 rows are kept"
    assert sum(len({file_of(every, key) for key in one}) > 1 for one in batches) >= 6


def test_epochs_and_seeds_give_other_orders_over_the_same_rows(dataset: TrainDataset) -> None:
    sampler = TaskBatchSampler(dataset, batch_size=2, seed=5)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append([[row for _, row in one] for one in sampler])
        assert epochs[-1] == [[row for _, row in one] for one in sampler], "iterating again repeats the epoch"
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    sampler.set_epoch(0)
    assert [[row for _, row in one] for one in sampler] == epochs[0]
    assert [[row for _, row in one] for one in TaskBatchSampler(dataset, batch_size=2, seed=6)] != epochs[0]
    files = [file_of(dataset, (0, one[0])) for one in epochs[0]]
    assert files != sorted(files) and files != sorted(files, reverse=True), "files take turns"
    left_out = [set(range(37)) - {row for one in epoch for row in one} for epoch in epochs]
    assert all(len(rows) == 1 for rows in left_out)
    assert len(set(map(frozenset, left_out))) > 1, "each epoch leaves another row out"


def test_the_order_is_pinned(dataset: TrainDataset) -> None:
    """A run started today must be resumable tomorrow: the first batches for a seed may never change."""
    sampler = TaskBatchSampler(dataset, batch_size=4, seed=42)
    sampler.set_epoch(3)
    first, second = itertools.islice(sampler, 2)
    assert first == [(3, 31), (3, 8), (3, 22), (3, 35)]
    assert second == [(3, 41), (3, 50), (3, 39), (3, 44)]


def loaders(
    dataset: TrainDataset, processes: int, batch: int, workers: int = 0, seed: int = 5
) -> list[DataLoader[list[TrainExample]]]:
    """Each process's loader, wrapped by accelerate as in a real run."""
    return [
        prepare_data_loader(
            DataLoader(
                dataset,
                batch_sampler=TaskBatchSampler(dataset, batch_size=batch, seed=seed, num_processes=processes),
                collate_fn=list,
                num_workers=workers,
            ),
            num_processes=processes,
            process_index=process,
            put_on_device=False,
        )
        for process in range(processes)
    ]


def epoch_of(loader: DataLoader[list[TrainExample]], epoch: int) -> Iterator[list[TrainExample]]:
    """An epoch as the Trainer starts it: ``_run_epoch`` of transformers 5.23."""
    loader.set_epoch(epoch)  # type: ignore[attr-defined]
    underlying = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if hasattr(underlying, "set_epoch"):
        underlying.set_epoch(epoch)
    return iter(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_see_the_single_process_batches(
    dataset: TrainDataset, tmp_path: Path, workers: int
) -> None:
    """2 processes x 4 queries draw what one process draws with 8, from the queries to the negatives."""
    every = mixed(dataset, tmp_path)  # 59 rows: the remainder of 3 is the only difference
    for epoch in (0, 3):
        (single,) = loaders(every, processes=1, batch=8)
        whole = list(epoch_of(single, epoch))
        shares = [list(epoch_of(loader, epoch)) for loader in loaders(every, 2, 4, workers)]
        full = [batch for batch in whole if len(batch) == 8]
        joined = [one + two for one, two in zip(*shares, strict=True)]
        assert len(full) == 7
        assert [batch for batch in joined if len(batch) == 8] == full


def test_a_remainder_that_two_processes_leave_out_moves_no_other_batch(dataset: TrainDataset, tmp_path: Path) -> None:
    """35 = 4 x 8 + 3: one process makes a batch of the 3, two do not; the batches of 8 and their order are the same."""
    write_rows(tmp_path / "uneven/a.jsonl", 35)
    write_rows(tmp_path / "uneven/b.jsonl", 24)
    rows = opened([tmp_path / "uneven"], dataset.options)
    whole = [one for one in TaskBatchSampler(rows, batch_size=8, seed=5) if len(one) == 8]
    halves = list(TaskBatchSampler(rows, batch_size=4, seed=5, num_processes=2))
    assert [one + two for one, two in zip(halves[::2], halves[1::2], strict=True)] == whole
    assert len(whole) == 7


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_same_file_on_all_processes_at_every_step(dataset: TrainDataset, processes: int) -> None:
    shares = [list(epoch_of(loader, 1)) for loader in loaders(dataset, processes, 3)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) > 5
    for step in zip(*shares, strict=True):
        assert len({example.row.split(":")[0] for batch in step for example in batch}) == 1
        assert len({len(batch) for batch in step}) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_inside_a_later_epoch(dataset: TrainDataset, processes: int) -> None:
    """skip_first_batches wraps the sampler once more; the epoch must still reach it."""
    for fresh, other in zip(loaders(dataset, processes, 2), loaders(dataset, processes, 2), strict=True):
        list(epoch_of(fresh, 0))
        straight = list(epoch_of(fresh, 1))
        dataset.set_epoch(0)
        resumed = list(epoch_of(skip_first_batches(other, 4), 1))
        assert resumed == straight[4:]
        assert list(epoch_of(other, 2)) == list(epoch_of(fresh, 2))


def test_too_few_rows_are_one_line(tmp_path: Path, dataset: TrainDataset) -> None:
    single = opened([tmp_path / "train/c.jsonl"], dataset.options)
    with pytest.raises(DataError) as error:
        TaskBatchSampler(single, batch_size=4, seed=1, num_processes=3)
    assert str(error.value) == (
        f"no batch can be made: {tmp_path}/train/c.jsonl holds 5 rows, a step of batch size 4 on 3 process(es) "
        "needs 6; add rows, lower --per_device_train_batch_size, or mix the files (--same_task_within_batch False)"
    )
    with pytest.raises(DataError, match="needs 8; add rows"):
        TaskBatchSampler(single, batch_size=8, seed=1, drop_last=True)


def test_a_file_too_small_is_named(dataset: TrainDataset, caplog: pytest.LogCaptureFixture) -> None:
    TaskBatchSampler(dataset, batch_size=2, seed=1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{dataset.tasks[3].name}: its 1 row make no batch and are left out"
    ]


def test_the_length_table_sets_the_batch_size_of_its_file(tmp_path: Path, dataset: TrainDataset) -> None:
    write_rows(tmp_path / "split/ko_len-0-500.jsonl", 100)
    write_rows(tmp_path / "split/other.jsonl", 10)
    asked = replace(dataset.options, train_group_size=8, batch_size_by_length=True)
    sizes = sorted(len(one) for one in TaskBatchSampler(opened([tmp_path / "split"], asked), batch_size=5, seed=1))
    assert sizes == [4, 5, 5, 48, 48]
