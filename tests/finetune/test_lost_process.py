"""Training under torchrun: a process that is killed or stopped ends the other one in a line, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_script
from finetune.helpers import TORCHRUN, environment, log_lines, rows, run_training, train_words, write_rows

WORKER = Path(__file__).with_name("lost_training.py")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named_and_the_run_goes_on(
    number: signal.Signals, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data/rows.jsonl", rows(16))
    words = train_words(
        tiny_model_dir, tmp_path / "data", tmp_path / "out", max_steps=100_000, save_strategy="steps", save_steps=2,
        save_total_limit=2, lr_scheduler_type="constant",
    )  # fmt: skip
    command = [sys.executable, *TORCHRUN, str(WORKER), str(tmp_path), *words]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 240
        while not (tmp_path / "out/checkpoint-4").exists():
            assert run.poll() is None and time.monotonic() < until, run.communicate()[1][-3000:]
            time.sleep(0.05)
        lost = int((tmp_path / "1.pid").read_text())
        os.kill(lost, number)
        _, stderr = run.communicate(timeout=100)
    assert run.returncode != 0
    (line,) = [line for line in stderr.splitlines() if "gave no sign of life" in line]
    assert f"rank 1 (process {lost} on " in line and line.endswith("goes on with --resume_from_checkpoint True")
    newest = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "out").glob("checkpoint-*"))
    words[words.index("100000")] = str(newest + 2)
    run_training([*words, "--resume_from_checkpoint", "True"], launcher=TORCHRUN)
    assert log_lines(tmp_path / "out")[-1]["step"] == newest + 2


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "WORLD_SIZE=2, and nothing of MASTER_ADDR or MASTER_PORT: start with torchrun",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE=2, and nothing of RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK=zero in the environment: expected a number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many in the environment: expected a number"),
    ],
    ids=["no address", "no rank", "rank beyond", "rank no number", "size no number"],
)
@pytest.mark.parametrize("script", ["run.py", "evaluation/step0-generate_embedding.py"])
def test_an_environment_of_half_a_launcher_is_one_line(
    script: str, variables: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"run.py": train_words(tmp_path, tmp_path, tmp_path / "out")}
    words["evaluation/step0-generate_embedding.py"] = ["--encoder", str(tmp_path), "--languages", "ko"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = run_script(script, words[script])
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr[-2000:]
    assert answer.stderr.count("error: ") == 1 and line in answer.stderr
