"""What is best is kept: exact weights, the base too, early stopping, and all of it after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import dev_lines, losses, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows
from safetensors.torch import load_file

# High enough to learn, and then to break: the best evaluation is neither the first nor the last one.
OPTIONS: dict[str, Any] = {
    "max_steps": 10, "save_strategy": "no", "learning_rate": 2e-2, "eval_steps": 2, "save_total_limit": None,
    "load_best_model_at_end": True, "lr_scheduler_type": "constant", "logging_steps": 1,
}  # fmt: skip
MOE = {"moe": "intermediate", "num_experts": 2, "unified_finetuning": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(24))
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dev(tmp_path_factory.mktemp("dev"), "ko", 72)


def command(model: Path, data: Path, dev: Path, output: Path, **options: Any) -> list[str]:
    return [*train_words(model, data, output, **{**OPTIONS, "eval_data_dir": dev, **options}), "--eval_languages", "ko"]


def state(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "trainer_state.json").read_text()))


def best_of(output: Path) -> dict[str, Any]:
    """The first line of the highest nDCG@10."""
    return max(dev_lines(output), key=lambda line: line["eval_ndcg@10"])


def weights(folder: Path) -> dict[str, bytes]:
    names = ["model.safetensors", "sparse_linear.pt", "colbert_linear.pt"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    assert found
    return found


@pytest.mark.parametrize("experts", [{}, MOE], ids=["dense", "experts and heads"])
def test_the_best_evaluation_is_what_is_left(
    experts: dict[str, Any], tiny_model_dir: Path, data: Path, dev: Path, tmp_path: Path
) -> None:
    answer = run_training(command(tiny_model_dir, data, dev, tmp_path / "out", **experts))
    lines, best, said = dev_lines(tmp_path / "out"), best_of(tmp_path / "out"), state(tmp_path / "out")
    assert 0 < best["step"] < lines[-1]["step"], [line["eval_ndcg@10"] for line in lines]
    assert (said["best_global_step"], said["best_metric"]) == (best["step"], best["eval_ndcg@10"])
    assert weights(tmp_path / "out") == weights(tmp_path / "out" / f"checkpoint-{best['step']}")
    assert f"of step {best['step']}; its weights are what is kept" in answer.stderr
    assert not (tmp_path / "out/dev/base").exists()


def test_the_base_may_be_best(tiny_model_dir: Path, data: Path, dev: Path, tmp_path: Path) -> None:
    photo = tmp_path / "out/dev/base/photo.txt"
    photo.parent.mkdir(parents=True)
    photo.write_text("mine")
    words = command(tiny_model_dir, data, dev, tmp_path / "out", learning_rate=1.0, save_strategy="best", max_steps=4)
    answer = run_training(words)
    assert best_of(tmp_path / "out")["step"] == 0 and state(tmp_path / "out")["best_global_step"] == 0
    assert "the base itself: no evaluation was above it" in answer.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    base, kept = load_file(tiny_model_dir / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert base.keys() == kept.keys() and all(base[name].equal(kept[name]) for name in base)
    (left,) = (tmp_path / "out/dev").glob("base.before-*")  # a folder of somebody else is left beside
    assert (left / "photo.txt").read_text() == "mine"


def test_only_new_bests_are_saved(tiny_model_dir: Path, data: Path, dev: Path, tmp_path: Path) -> None:
    run_training(
        command(tiny_model_dir, data, dev, tmp_path / "out", save_strategy="best", load_best_model_at_end=False)
    )
    rising, top = [], -1.0
    for line in dev_lines(tmp_path / "out"):
        if line["eval_ndcg@10"] > top:
            top = line["eval_ndcg@10"]
            rising += [line["step"]] if line["step"] else []
    saved = sorted(int(p.name.rpartition("-")[2]) for p in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == rising and len(saved) < len(dev_lines(tmp_path / "out")) - 1
    assert weights(tmp_path / "out") != weights(tmp_path / "out" / f"checkpoint-{saved[-1]}")


@pytest.fixture(scope="module")
def stopped(tiny_dropout_dir: Path, data: Path, dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends by its patience."""
    output = tmp_path_factory.mktemp("run") / "stopped"
    answer = run_training(command(tiny_dropout_dir, data, dev, output, **PATIENT))
    (output / "stderr").write_text(answer.stderr)
    return output


PATIENT: dict[str, Any] = {
    "max_steps": 40, "eval_steps": 1, "early_stopping_patience": 3, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


def test_early_stopping_counts_evaluations_without_a_new_best(stopped: Path) -> None:
    lines, best = dev_lines(stopped), best_of(stopped)
    assert lines[-1]["step"] == best["step"] + 3 < 40
    assert "no new best in 3 evaluations" in (stopped / "stderr").read_text()


@pytest.mark.parametrize("before_the_end", [3, 2, 1, 0])
def test_a_resumed_run_keeps_best_and_patience(
    before_the_end: int, stopped: Path, tiny_dropout_dir: Path, data: Path, dev: Path, tmp_path: Path
) -> None:
    """Resumed at the best step, between it and the end, and where the patience was used up already."""
    output, last = tmp_path / "out", dev_lines(stopped)[-1]["step"]
    shutil.copytree(stopped, output)
    for folder in output.glob("checkpoint-*"):
        recorded = json.loads((folder / "trainer_state.json").read_text())
        if recorded["best_model_checkpoint"]:
            recorded["best_model_checkpoint"] = recorded["best_model_checkpoint"].replace(str(stopped), str(output))
        (folder / "trainer_state.json").write_text(json.dumps(recorded))
        if int(folder.name.rpartition("-")[2]) > last - before_the_end:
            shutil.rmtree(folder)
    for name in ("model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    run_training([*command(tiny_dropout_dir, data, dev, output, **PATIENT), "--resume_from_checkpoint", "True"])
    volatile = {"eval_seconds"}

    def stable(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in volatile} for line in dev_lines(folder) + losses(folder)]

    assert stable(output) == stable(stopped)
    assert weights(output) == weights(stopped)
    assert state(output)["best_global_step"] == state(stopped)["best_global_step"]
