"""--resume_from_checkpoint goes on and does not start over, knows its forwards, and takes whole checkpoints only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

# Two micro-batches a step; self-distillation counts from the sixth forward on, which is in step 3.
OPTIONS: dict[str, Any] = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None,
    "gradient_accumulation_steps": 2, "unified_finetuning": True, "use_self_distill": True,
    "self_distill_start_step": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(24)).parent


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with checkpoints at steps 2 and 4."""
    output = tmp_path_factory.mktemp("run") / "whole"
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS))
    return output


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text())


def test_true_goes_on_from_the_newest_checkpoint(whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    # Marked, so that a run that starts over (and logs the same numbers) would be seen.
    state = read_state(tmp_path / "checkpoint-2")
    state["log_history"][0]["marked"] = True
    (tmp_path / "checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    run_training(train_words(tiny_model_dir, data, tmp_path, **OPTIONS, resume_from_checkpoint=True))
    final = read_state(tmp_path)
    assert final["global_step"] == 4
    assert [line.get("marked", False) for line in final["log_history"][:4]] == [True, False, False, False]
    assert read_state(tmp_path / "checkpoint-2")["log_history"][0]["marked"]  # not written again
    assert read_state(tmp_path / "checkpoint-4")["log_history"][0]["marked"]


def test_the_count_of_forwards_goes_on(whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    expected = log_lines(whole)
    # Self-distillation begins inside the part that is run again, so a count from 0 would be seen.
    assert ["self_dense" in line for line in expected] == [False, False, True, True]
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    run_training(train_words(tiny_model_dir, data, tmp_path, **OPTIONS, resume_from_checkpoint=True))
    assert log_lines(tmp_path) == expected


def test_a_longer_run_goes_on_from_the_last_step(whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    more = {**OPTIONS, "max_steps": 5, "save_strategy": "no", "resume_from_checkpoint": tmp_path / "checkpoint-4"}
    run_training(train_words(tiny_model_dir, data, tmp_path, **more, resume_anyway=True))
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert log_lines(tmp_path)[:4] == log_lines(whole)


def test_without_the_flag_a_run_starts_at_the_first_step(
    whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    state = read_state(tmp_path / "checkpoint-2")
    state["log_history"][0]["marked"] = True
    (tmp_path / "checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    run_training(train_words(tiny_model_dir, data, tmp_path, **OPTIONS, overwrite_output_dir=True))
    assert [line.get("marked", False) for line in log_lines(tmp_path)] == [False] * 4


@pytest.mark.parametrize(
    "missing", ["optimizer.pt", "scheduler.pt", "config.json", "model.safetensors", "trainer_state.json"]
)
def test_a_checkpoint_that_lacks_a_file_is_not_whole(
    whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / missing).unlink()
    options = {**OPTIONS, "save_strategy": "no"}
    words = train_words(tiny_model_dir, data, tmp_path, **options)
    answer = run_training([*words, "--resume_from_checkpoint", str(tmp_path / "checkpoint-4")], check=False)
    assert answer.returncode == 2
    assert "checkpoint-4: not a whole checkpoint" in answer.stderr
    # The newest whole one is an older one.
    answer = run_training([*words, "--resume_from_checkpoint", "True"])
    assert "checkpoint-4 is not whole" in answer.stderr
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines == log_lines(whole)
