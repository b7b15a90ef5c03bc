"""Kill -9 in mid-run, resume: every logged value equals the uninterrupted run's, and so do the final weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finetune.helpers import REPOSITORY, environment, log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file

# Saved every 3 steps and logged every 2: a checkpoint stands between two log lines, and epochs end between both.
OPTIONS = {
    "max_steps": 14, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "gradient_accumulation_steps": 2,
    "moe": "intermediate", "num_experts": 2, "router_gradient": "straight_through", "router_aux_loss_coef": 0.01,
    "router_jitter": 0.1, "dataloader_num_workers": 1, "save_total_limit": None,
}  # fmt: skip
VOLATILE = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(14))
    write_rows(folder / "b.jsonl", rows(10, neg_q=False))
    return folder


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while not path.is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until, f"{path} never appeared"
        time.sleep(0.02)


def test_killed_and_resumed_equals_uninterrupted(tiny_dropout_dir: Path, data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_training(train_words(tiny_dropout_dir, data, whole, **OPTIONS))

    words = train_words(tiny_dropout_dir, data, broken, **OPTIONS)
    # Twice: once as soon as a checkpoint stands, once a checkpoint later.
    for step in (3, 9):
        resume = [] if step == 3 else ["--resume_from_checkpoint", "True"]
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "run.py"), *words, *resume],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(broken / f"checkpoint-{step}" / "trainer_state.json", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # A kill in the middle of saving leaves a folder without its state; it must be passed over.
    torn = broken / "checkpoint-999"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    answer = run_training([*words, "--resume_from_checkpoint", "True"])
    assert "checkpoint-999 is not whole" in answer.stderr
    torn.joinpath("model.safetensors").unlink()
    torn.rmdir()

    expected, resumed = log_lines(whole), log_lines(broken)
    assert len(expected) == 7
    for before, after in zip(expected, resumed, strict=True):
        assert {k: v for k, v in before.items() if k not in VOLATILE} == {
            k: v for k, v in after.items() if k not in VOLATILE
        }
    ours, theirs = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_folder_that_is_no_checkpoint_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", resume_from_checkpoint=tmp_path)
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    assert "not a whole checkpoint" in answer.stderr
    assert "Traceback" not in answer.stderr
