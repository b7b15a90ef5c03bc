"""A damaged checkpoint is passed over by name, or refused where it is named; a run that had ended does not go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import rows, run_training, train_words, write_rows

OPTIONS: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows(12))


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with the checkpoint of each."""
    output = tmp_path_factory.mktemp("run") / "whole"
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS))
    return output


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_text("{}")


def of_nothing(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": {}}))


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("optimizer.pt", cut), ("optimizer.pt", emptied), ("scheduler.pt", cut), ("rng_state.pth", cut),
    ("model.safetensors", cut), ("trainer_state.json", emptied), ("loss_window.json", cut),
    ("loss_window.json", emptied), ("run.json", cut), ("run.json", of_nothing), ("run.json", Path.unlink),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{name} {damage.__name__}" for name, damage in DAMAGE])
def test_the_one_before_it_is_gone_on_from(
    name: str, damage: Callable[[Path], None], output: Path, whole: Path, data: Path, tiny_model_dir: Path
) -> None:
    damage(output / "checkpoint-2" / name)
    answer = run_training(train_words(tiny_model_dir, data, output, **OPTIONS, resume_from_checkpoint=True))
    (line,) = [text for text in answer.stderr.splitlines() if "passed over" in text]
    assert "checkpoint-2" in line and name in line
    assert "goes on from" in answer.stderr and "checkpoint-1" in answer.stderr
    assert digest(output) == digest(whole)


def test_one_that_is_named_is_refused(output: Path, data: Path, tiny_model_dir: Path) -> None:
    cut(output / "checkpoint-2" / "optimizer.pt")
    words = train_words(tiny_model_dir, data, output, **OPTIONS, resume_from_checkpoint=output / "checkpoint-2")
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    assert "not a whole checkpoint (optimizer.pt cannot be read: " in answer.stderr.splitlines()[-1]


def test_lost_random_states_are_said(output: Path, data: Path, tiny_model_dir: Path) -> None:
    (output / "checkpoint-2" / "rng_state.pth").unlink()
    answer = run_training(train_words(tiny_model_dir, data, output, **OPTIONS, resume_from_checkpoint=True))
    assert "checkpoint-2 holds no random states" in answer.stderr


@pytest.mark.parametrize("steps", [2, 1])
def test_a_run_that_had_ended_is_not_trained_further(
    steps: int, output: Path, whole: Path, data: Path, tiny_model_dir: Path
) -> None:
    words = train_words(tiny_model_dir, data, output, **{**OPTIONS, "max_steps": steps}, resume_from_checkpoint=True)
    answer = run_training(words)
    assert f"the checkpoint is of step 2, the run has {steps}: nothing is left to train" in answer.stderr
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert digest(output) == digest(whole)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "sparse_linear.pt"])
def test_a_model_of_somebody_else_is_not_written_over(
    name: str, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    words = train_words(tiny_model_dir, data, tmp_path / "out", **OPTIONS, overwrite_output_dir=True)
    answer = run_training(words, check=False)
    assert answer.returncode == 2 and f"holds {name}, which no run of this program wrote" in answer.stderr
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(name, "mine")]


def test_the_model_of_an_earlier_run_is_replaced_with_a_line(output: Path, data: Path, tiny_model_dir: Path) -> None:
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = digest(output)
    words = train_words(tiny_model_dir, data, output, **{**OPTIONS, "learning_rate": 1e-2, "save_strategy": "no"})
    assert "holds the model of an earlier run, which this one will replace" in run_training(words).stderr
    assert digest(output) != before


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
