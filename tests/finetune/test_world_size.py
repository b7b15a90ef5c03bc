"""--global_batch_size: the number of processes may change from start to start, the rows and losses of a step do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import (
    REPOSITORY,
    TOGETHER,
    TORCHRUN,
    environment,
    log_lines,
    opened,
    rows,
    run_training,
    train_words,
    write_rows,
)

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler
from FlagEmbedding.finetune.resume.global_batch import divide
from FlagEmbedding.utils.errors import DataError, UsageError

# Two files with a remainder each, several epochs, and a checkpoint inside an epoch and between two log lines.
OPTIONS: dict[str, Any] = {
    "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "global_batch_size": 4,
    "per_device_train_batch_size": 2, "train_group_size": 3, "save_total_limit": None,
}  # fmt: skip
SHARED = {"negatives_cross_device": True, "per_device_train_batch_size": None, "moe": "intermediate", "num_experts": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "data"
    write_rows(folder / "a.jsonl", rows(11))
    write_rows(folder / "b.jsonl", rows(24, neg_q=False)[13:])
    return folder


@pytest.mark.parametrize("case", ["own negatives and dropout", "shared negatives"])
def test_one_process_two_and_back_equal_one_process(
    case: str, tiny_dropout_dir: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    model, options = (tiny_model_dir, OPTIONS | SHARED) if "shared" in case else (tiny_dropout_dir, OPTIONS)
    whole, output = tmp_path / "whole", tmp_path / "out"
    run_training(train_words(model, data, whole, **options))
    shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3")
    words = [*train_words(model, data, output, **options), "--resume_from_checkpoint", "True"]
    answer = run_training(words, launcher=TOGETHER)
    assert "processes: the checkpoint has 1, this run says 2" in answer.stderr
    middle = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    for folder in [*output.glob("checkpoint-[38]"), output / "trainer_state.json"]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    answer = run_training(words)
    assert "processes: the checkpoint has 2, this run says 1" in answer.stderr
    again, expected = log_lines(output), log_lines(whole)
    assert [line["step"] for line in again] == [2, 4, 6, 8]
    assert [line for line in middle if "loss" in line] == again[:3]
    assert any("penalty" in line for line in again)
    for ours, theirs in zip(again, expected, strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours.keys() == theirs.keys()  # a step of rows without neg_q has no penalty
        for name in {"loss", "contrastive_loss", "penalty", "grad_norm"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), (ours["step"], name)


def test_what_cannot_be_exact_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """A router loss is taken over a process's own tokens, and self-distillation counts a process's forwards."""
    shared = OPTIONS | SHARED | {"router_aux_loss_coef": 0.1, "max_steps": 3}
    counted = OPTIONS | {"unified_finetuning": True, "use_self_distill": True, "self_distill_start_step": 4}
    published = OPTIONS | {"global_batch_size": None, "gradient_accumulation_steps": 2}
    two = {"global_batch_size": None, "gradient_accumulation_steps": 1}
    for number, (options, change, line) in enumerate(
        [
            (shared, {}, "queries that share a router loss (--per_device_train_batch_size): the checkpoint has 4"),
            (counted, {}, "forwards per step, which --self_distill_start_step counts: the checkpoint has 2"),
            (published, two, "the order of the batches differs"),
        ]
    ):
        output = tmp_path / str(number)
        run_training(train_words(tiny_model_dir, data, output, **{**options, "max_steps": 3}))
        words = train_words(tiny_model_dir, data, output, **{**options, **change, "max_steps": 3})
        answer = run_training([*words, "--resume_from_checkpoint", "True"], launcher=TOGETHER, check=False)
        assert answer.returncode != 0
        errors = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
        assert len(errors) == 1 and line in errors[0], answer.stderr[-3000:]


def test_published_cross_device_runs_go_on_with_other_processes(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Without --global_batch_size too, where the same queries share their negatives (files of whole steps)."""
    write_rows(tmp_path / "data" / "rows.jsonl", rows(16))
    options = {"max_steps": 4, "negatives_cross_device": True, "save_strategy": "steps", "save_steps": 2}
    words = [tiny_model_dir, tmp_path / "data"]
    run_training(train_words(*words, tmp_path / "one", **options, per_device_train_batch_size=4))
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    run_training(
        [*train_words(*words, tmp_path / "two", **options), "--resume_from_checkpoint", "True"], launcher=TOGETHER
    )
    for both, alone in zip(log_lines(tmp_path / "two"), log_lines(tmp_path / "one"), strict=True):
        assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_a_checkpoint_that_not_all_processes_see_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Disks of each machine's own: the first one decides, none starts over while another goes on."""
    options = {**OPTIONS, "max_steps": 3, "resume_from_checkpoint": True}
    run_training(train_words(tiny_model_dir, data, tmp_path / "0" / "out", **options))
    (tmp_path / "1").mkdir()
    words = train_words(tiny_model_dir, data, Path("out"), **options)
    own_disk = ["--no-python", "bash", "-c", 'cd "$0/$RANK" && exec "${@}"', str(tmp_path)]
    command = [sys.executable, *TORCHRUN, *own_disk, sys.executable, str(REPOSITORY / "run.py"), *words]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert answer.returncode != 0
    (line,) = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
    assert line.startswith("error: out/checkpoint-3: process(es) 1 do not see this checkpoint")
    assert not list((tmp_path / "1").rglob("checkpoint-*"))


def test_how_a_step_is_divided() -> None:
    assert divide(32, 4, 4, 1, shared=False) == (4, 2)
    assert divide(32, 4, 4, 2, shared=False) == (4, 2)
    assert divide(32, 1, 8, 1, shared=False) == (8, 4)
    assert divide(32, 4, 8, 2, shared=True) == (4, 2)
    assert divide(64, 2, 8, 1, shared=True) == (32, 1)
    for arguments, line in [
        (
            (30, 4, 4, 1, False),
            r"30 cannot be divided over 4 process\(es\) × --per_device_train_batch_size 4: .*of 16",
        ),
        ((30, 4, 8, 1, True), r"30 cannot be divided over 4 process\(es\) × --gradient_accumulation_steps 1: .* of 4"),
        ((32, 4, 4, 3, False), "makes --gradient_accumulation_steps 2, got 3: leave it out"),
        ((32, 4, 3, 1, True), "makes --per_device_train_batch_size 8, got 3: leave it out"),
        ((0, 1, 1, 1, False), "--global_batch_size must be at least 1, got 0"),
    ]:
        with pytest.raises(UsageError, match=line):
            divide(*arguments)


def step_rows(sampler: TaskBatchSampler, per_step: int, epoch: int) -> list[list[tuple[int, ...]]]:
    """The rows of each batch of each optimizer step."""
    sampler.set_epoch(epoch)
    batches = [tuple(row for _, row in batch) for batch in sampler]
    return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]


def test_a_step_holds_the_same_rows_however_it_is_divided(data: Path) -> None:
    dataset = opened(sorted(data.glob("*.jsonl")), DataArguments(train_data=["-"], same_task_within_batch=True))
    left_out: Counter[int] = Counter()
    for epoch in range(6):
        # A query's own batch serves: 4 batches of 2 a step, dealt out.
        own = step_rows(TaskBatchSampler(dataset, batch_size=2, seed=3, per_step=4), 4, epoch)
        assert [len(step) for step in own] == [4, 4]
        seen = {row for step in own for batch in step for row in batch}
        left_out.update(set(range(22)) - seen)
        # All batches serve: 8 queries a step, in 1, 2 or 4 parts.
        parts = [
            step_rows(
                TaskBatchSampler(
                    dataset, batch_size=8 // world, seed=3, num_processes=world, drop_last=True, per_step=world
                ),
                world, epoch,
            )
            for world in (1, 2, 4, 8)
        ]  # fmt: skip
        flat = [[[row for batch in step for row in batch] for step in steps] for steps in parts]
        assert flat[0] == flat[1] == flat[2] == flat[3]
        assert len(flat[0]) == 2
    assert len(left_out) > 6, "the same rows are left out in every epoch"
    with pytest.raises(DataError, match="makes 10 batches, a step takes 16; add rows, or lower it"):
        TaskBatchSampler(dataset, batch_size=2, seed=3, per_step=16)
