"""--resume_from_checkpoint goes on with the same run or says by name what differs; --resume_anyway takes new values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

OPTIONS: dict[str, Any] = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "data"
    write_rows(folder / "a.jsonl", rows(14))
    write_rows(folder / "b.jsonl", rows(24)[14:])
    return folder


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with checkpoints at steps 2 and 4."""
    output = tmp_path_factory.mktemp("run") / "whole"
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS))
    return output


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A folder of the same run that got as far as step 2."""
    shutil.copytree(whole / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    return tmp_path / "out"


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def half_of_the_rows(place: Path) -> dict[str, Any]:
    write_rows(place / "data" / "a.jsonl", rows(7))
    return {"train_data": write_rows(place / "data" / "b.jsonl", rows(24)[14:]).parent}


def rows_turned_around(place: Path) -> dict[str, Any]:
    write_rows(place / "data" / "a.jsonl", rows(14)[::-1])
    return {"train_data": write_rows(place / "data" / "b.jsonl", rows(24)[14:]).parent}


def one_file(place: Path) -> dict[str, Any]:
    return {"train_data": write_rows(place / "data" / "a.jsonl", rows(14)).parent}


def other_order(place: Path) -> dict[str, Any]:
    write_rows(place / "data" / "z.jsonl", rows(14))
    return {"train_data": write_rows(place / "data" / "b.jsonl", rows(24)[14:]).parent}


ANOTHER: list[tuple[Any, str]] = [
    ({"learning_rate": 2e-3}, "--learning_rate: the checkpoint has 0.001, this run says 0.002"),
    ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type: the checkpoint has linear, this run says cosine"),
    ({"warmup_steps": 0}, "warmup steps (--warmup_steps, --warmup_ratio): the checkpoint has 1, this run says 0"),
    ({"weight_decay": 0.1}, "--weight_decay: the checkpoint has 0.0, this run says 0.1"),
    ({"max_grad_norm": 2.0}, "--max_grad_norm"),
    ({"max_steps": 6}, "--num_train_epochs; the linear schedule ends there): the checkpoint has 4, this run says 6"),
    ({"max_steps": 3}, "the linear schedule ends there): the checkpoint has 4, this run says 3"),
    ({"sentence_pooling_method": "mean"}, "--sentence_pooling_method: the checkpoint has cls, this run says mean"),
    ({"normlized": False}, "--normalize_embeddings: the checkpoint has true, this run says false"),
    ({"temperature": 0.05}, "--temperature: the checkpoint has 0.02, this run says 0.05"),
    ({"penalty_weight": 0.2}, "--penalty_weight: the checkpoint has 0.1, this run says 0.2"),
    ({"query_instruction_for_retrieval": "find: "}, "--query_instruction_for_retrieval: the checkpoint has null"),
    ({"query_max_len": 20}, "--query_max_len: the checkpoint has 24, this run says 20"),
    ({"train_group_size": 4}, "--train_group_size: the checkpoint has 3, this run says 4"),
    ({"per_device_train_batch_size": 4}, "accumulation × processes): the checkpoint has 2, this run says 4"),
    ({"gradient_accumulation_steps": 2}, "accumulation × processes): the checkpoint has 2, this run says 4"),
    (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        "queries that share their negatives (--per_device_train_batch_size): the checkpoint has 2, this run says 1",
    ),
    ({"seed": 7}, "--data_seed: the checkpoint has 42, this run says 7"),
    ({"data_seed": 7}, "--data_seed: the checkpoint has 42, this run says 7"),
    ({"same_task_within_batch": False}, "--same_task_within_batch: the checkpoint has true, this run says false"),
    (half_of_the_rows, "a.jsonl has another content (the checkpoint has 14 rows, this run says"),
    (rows_turned_around, "--train_data: a.jsonl has another content"),
    (one_file, "the checkpoint has 2 file(s) of 24 rows (a.jsonl, b.jsonl), this run says 1 file(s) of 14"),
    (other_order, "another order of the files: the checkpoint has a.jsonl, b.jsonl, this run says b.jsonl, z.jsonl"),
    ({"only_train": "output"}, "--only_train: the checkpoint has null, this run says output"),
    ({"optim": "sgd"}, "--optim: the checkpoint has adamw_torch_fused, this run says sgd"),
    ({"moe": "output", "num_experts": 2}, "--moe: the checkpoint has null, this run says output"),
    ({"unified_finetuning": True}, "--unified_finetuning: the checkpoint has false, this run says true"),
]  # fmt: skip
FIXED = ("only_train", "optim", "moe", "unified_finetuning")


def named(change: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in change.items()) if isinstance(change, dict) else str(change.__name__)


@pytest.mark.parametrize(("change", "line"), ANOTHER, ids=[named(change) for change, _ in ANOTHER])
def test_another_run_is_refused_by_name(
    change: Any, line: str, output: Path, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = change if isinstance(change, dict) else change(tmp_path)
    before = seen(output)
    words = train_words(tiny_model_dir, data, output, **{**OPTIONS, **options, "resume_from_checkpoint": True})
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    errors = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0], errors
    assert "checkpoint-2 is of another run" in errors[0]
    assert seen(output) == before
    fixed = any(name in options for name in FIXED)
    assert ("--resume_anyway True" in errors[0]) != fixed
    if fixed:  # no rate or optimizer's state fits: refused even then
        answer = run_training([*words, "--resume_anyway", "True"], check=False)
        assert answer.returncode == 2 and line in answer.stderr and seen(output) == before


def test_every_difference_is_named_at_once(output: Path, data: Path, tiny_model_dir: Path) -> None:
    options = {**OPTIONS, "learning_rate": 2e-3, "temperature": 0.1, "train_group_size": 2, "logging_steps": 2}
    words = train_words(tiny_model_dir, data, output, **options, resume_from_checkpoint=output / "checkpoint-2")
    line = run_training(words, check=False).stderr
    assert all(f"--{name}: the checkpoint has" in line for name in ("learning_rate", "temperature", "train_group_size"))
    assert "--logging_steps" not in line


def test_what_changes_no_number_goes_on_with_a_line(
    output: Path, whole: Path, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "elsewhere")
    options = {
        **OPTIONS, "save_steps": 1, "save_total_limit": 2, "dataloader_num_workers": 1, "run_name": "second",
        "cache_path": tmp_path / "cache", "train_data": tmp_path / "elsewhere", "sentence_pooling_method": "cls",
        "num_train_epochs": 9, "engine": "packed", "slab_tokens": 4096,
    }  # fmt: skip
    answer = run_training(train_words(tiny_model_dir, data, output, **options, resume_from_checkpoint=True))
    (line,) = [text for text in answer.stderr.splitlines() if "harmless differences" in text]
    assert "--save_steps: the checkpoint has 2, this run says 1" in line
    assert all(f"--{name}: " in line for name in ("save_total_limit", "dataloader_num_workers", "cache_path"))
    assert not any(name in line for name in ("train_data", "pooling", "epochs", "resume"))
    assert log_lines(output) == log_lines(whole)


def test_anyway_goes_on_with_the_new_values(output: Path, data: Path, tiny_model_dir: Path) -> None:
    options = {**OPTIONS, "learning_rate": 4e-3, "max_steps": 6, "weight_decay": 0.5}
    answer = run_training(
        train_words(tiny_model_dir, data, output, **options, resume_from_checkpoint=True, resume_anyway=True)
    )
    assert "another run from here on: --learning_rate: the checkpoint has 0.001, this run says 0.004" in answer.stderr
    rates = [line["learning_rate"] for line in log_lines(output)]
    # One step of warmup, then down to 0 at the last step: first as begun, from step 3 on as said now.
    assert rates == pytest.approx([0.0, 1e-3, 4e-3 * 4 / 5, 4e-3 * 3 / 5, 4e-3 * 2 / 5, 4e-3 * 1 / 5])
    record = json.loads((output / "checkpoint-6" / "run.json").read_text())
    assert record["run_id"] == json.loads((output / "checkpoint-2" / "run.json").read_text())["run_id"]
    assert record["fingerprint"]["options"]["learning_rate"] == 4e-3
    assert [change["step"] for change in record["changes"]] == [2]
    import torch

    groups = torch.load(output / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    # The changed run is a run of its own from now on.
    answer = run_training(
        train_words(tiny_model_dir, data, output, **{**options, "max_steps": 6}, resume_from_checkpoint=True)
    )
    assert "goes on from" in answer.stderr and "checkpoint-6" in answer.stderr


def test_a_constant_rate_may_go_on_for_longer(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "lr_scheduler_type": "constant_with_warmup"}
    run_training(train_words(tiny_model_dir, data, tmp_path / "long", **{**options, "max_steps": 4}))
    run_training(train_words(tiny_model_dir, data, tmp_path / "out", **{**options, "max_steps": 2}))
    words = train_words(tiny_model_dir, data, tmp_path / "out", **options, resume_from_checkpoint=True)
    assert "the constant_with_warmup schedule ends there): the checkpoint has 2, this" in run_training(words).stderr
    assert log_lines(tmp_path / "out") == log_lines(tmp_path / "long")
    # A warmup that is a share of the steps grows with them.
    shared = {**options, "warmup_steps": None, "warmup_ratio": 0.5}
    run_training(train_words(tiny_model_dir, data, tmp_path / "share", **shared))
    shared |= {"max_steps": 6, "resume_from_checkpoint": True}
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "share", **shared), check=False)
    assert answer.returncode == 2
    assert "warmup steps (--warmup_steps, --warmup_ratio): the checkpoint has 2, this run says 3" in answer.stderr


def test_epochs_are_compared_by_the_steps_they_make(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """12 batches an epoch, two to a step."""
    options = {**OPTIONS, "max_steps": None, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "save_steps": 4}
    run_training(train_words(tiny_model_dir, data, tmp_path, **options))
    options |= {"num_train_epochs": None, "resume_from_checkpoint": tmp_path / "checkpoint-4"}
    answer = run_training(train_words(tiny_model_dir, data, tmp_path, **{**options, "max_steps": 7}), check=False)
    assert answer.returncode == 2
    assert "schedule ends there): the checkpoint has 6, this run says 7" in answer.stderr
    answer = run_training(train_words(tiny_model_dir, data, tmp_path, **{**options, "max_steps": 6}))
    assert "harmless differences" not in answer.stderr


def test_a_checkpoint_of_an_older_version_goes_on_with_one_line(
    output: Path, whole: Path, data: Path, tiny_model_dir: Path
) -> None:
    (output / "checkpoint-2" / "run.json").unlink()
    answer = run_training(train_words(tiny_model_dir, data, output, **OPTIONS, resume_from_checkpoint=True))
    assert answer.stderr.count("kept no fingerprint: going on without comparing") == 1
    assert log_lines(output) == log_lines(whole)
    assert sorted(path.name for path in (output / "checkpoint-2").iterdir() if path.name == "run.json") == []
    assert json.loads((output / "checkpoint-4" / "run.json").read_text())["run_id"]


def test_another_model_of_the_same_shape_is_told_by_its_configuration(
    output: Path, data: Path, tiny_dropout_dir: Path
) -> None:
    words = train_words(tiny_dropout_dir, data, output, **OPTIONS, resume_from_checkpoint=True)
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    assert "the model's hidden_dropout_prob: the checkpoint has 0.0, this run says 0.1" in answer.stderr
