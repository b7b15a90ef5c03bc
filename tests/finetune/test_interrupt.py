"""SIGTERM and Ctrl-C: a checkpoint at the next step boundary, exit code 143 or 130, and an exact continuation."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import (
    REPOSITORY,
    TOGETHER,
    TORCHRUN,
    environment,
    log_lines,
    rows,
    run_training,
    train_words,
    write_rows,
)

OPTIONS: dict[str, Any] = {
    "max_steps": 4000, "save_strategy": "no", "gradient_accumulation_steps": 2, "logging_steps": 3,
    "lr_scheduler_type": "constant", "learning_rate": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(24)).parent


def start(words: list[str], launcher: list[str] | None = None) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a terminal or SLURM would start it."""
    return subprocess.Popen(
        [sys.executable, "-u", *(launcher or []), str(REPOSITORY / "run.py"), *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """What it says up to a line that matches."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"ended without {pattern}: {said[-3000:]}")


def finish(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=120)[0]
    return said


def stopped_at(output: Path) -> int:
    (checkpoint,) = output.glob("checkpoint-*")
    return int(checkpoint.name.rpartition("-")[2])


@pytest.mark.parametrize(
    ("number", "code", "whom"),
    [(signal.SIGTERM, 143, "process"), (signal.SIGINT, 130, "group")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_ends_the_step_and_the_run_goes_on_exactly(
    number: signal.Signals, code: int, whom: str, tiny_dropout_dir: Path, data: Path, tmp_path: Path
) -> None:
    """``group``: Ctrl-C reaches the workers that read the rows as well."""
    words = train_words(tiny_dropout_dir, data, tmp_path / "out", **OPTIONS, dataloader_num_workers=1)
    process = start(words)
    until(process, r"'loss'")
    (os.killpg if whom == "group" else os.kill)(process.pid, number)
    said = finish(process)
    assert process.returncode == code, said[-3000:]
    step = stopped_at(tmp_path / "out")
    (line,) = [text for text in said.splitlines() if text.startswith("stopped by")]
    assert line.startswith(f"stopped by {number.name} after step {step}: {tmp_path}/out/checkpoint-{step} is written")
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "config.json").exists(), "half a run passes for a trained model"
    more = {**OPTIONS, "max_steps": step + 5}
    run_training(train_words(tiny_dropout_dir, data, tmp_path / "out", **more, resume_from_checkpoint=True))
    run_training(train_words(tiny_dropout_dir, data, tmp_path / "whole", **more))
    assert len(log_lines(tmp_path / "whole")) == (step + 5) // 3
    assert log_lines(tmp_path / "out") == log_lines(tmp_path / "whole")


def test_a_second_signal_ends_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "rows.jsonl", rows(8000))
    slow = {**OPTIONS, "gradient_accumulation_steps": 4000, "max_steps": 2}  # half a minute a step
    process = start(train_words(tiny_model_dir, tmp_path / "data", tmp_path / "out", **slow))
    until(process, r"run \S+: starts")
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # what a launcher hands on so soon is the same signal
    time.sleep(2)
    alive = process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert alive
    assert process.returncode == -signal.SIGTERM
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_all_processes_save_at_the_same_step_whoever_was_told(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", **OPTIONS)
    process = start(words, TORCHRUN)
    until(process, r"'loss'")
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    ranks = {}
    for child in map(int, found.stdout.split()):
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks |= {value[5:]: child for value in variables if value.startswith("RANK=")}
    os.kill(ranks["1"], signal.SIGTERM)
    said = finish(process)
    assert process.returncode != 0
    step = stopped_at(tmp_path / "out")
    assert len(re.findall(rf"stopped by SIGTERM after step {step}", said)) == 1
    checkpoint = tmp_path / "out" / f"checkpoint-{step}"
    assert (checkpoint / "rng_state_0.pth").exists() and (checkpoint / "rng_state_1.pth").exists()
    more = {**OPTIONS, "max_steps": step + 4}
    run_training(
        train_words(tiny_model_dir, data, tmp_path / "out", **more, resume_from_checkpoint=True), launcher=TOGETHER
    )
    run_training(train_words(tiny_model_dir, data, tmp_path / "whole", **more), launcher=TOGETHER)
    assert log_lines(tmp_path / "out") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize("by", ["epoch", "steps"])
def test_stopped_where_an_epoch_ends_its_log_line_is_kept(
    by: str, tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 batches an epoch, 6 steps: the signal comes in step 6, and in step 8 within an epoch."""
    from FlagEmbedding.finetune.resume.interrupt import StopAtStep

    options = {**OPTIONS, "max_steps": 14, "logging_strategy": by, "logging_steps": 4}
    run_training(train_words(tiny_model_dir, data, tmp_path / "whole", **options))
    for step in (6, 8):
        begin = StopAtStep.on_step_begin

        def told(self: Any, args: Any, state: Any, control: Any, step: int = step, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                signal.raise_signal(signal.SIGTERM)

        output = tmp_path / f"out-{step}"
        monkeypatch.setattr(StopAtStep, "on_step_begin", told)
        answer = run_training(train_words(tiny_model_dir, data, output, **options), check=False)
        monkeypatch.setattr(StopAtStep, "on_step_begin", begin)
        assert (answer.returncode, stopped_at(output)) == (143, step)
        run_training(train_words(tiny_model_dir, data, output, **options, resume_from_checkpoint=True))
        assert log_lines(output) == log_lines(tmp_path / "whole")
        shutil.rmtree(output)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_the_last_step_the_run_ends_by_itself(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from FlagEmbedding.finetune.resume.interrupt import StopAtStep

    def told(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StopAtStep, "on_step_begin", told)
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", **{**OPTIONS, "max_steps": 3}))
    assert answer.returncode == 0
    assert (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_trainers_own_flag_is_this_one(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 1, "enable_jit_checkpoint": True}
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", **options))
    assert "--enable_jit_checkpoint: run.py writes a checkpoint on SIGTERM without it" in answer.stderr
