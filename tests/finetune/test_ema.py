"""Averaged weights: against torch's AveragedModel, evaluated and kept, and exact after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.dev_data import dev_lines, write_dev
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from FlagEmbedding.finetune.ema import EMA_FILE

OPTIONS: dict[str, Any] = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "learning_rate": 1e-2,
    "lr_scheduler_type": "constant", "ema_decay": 0.7, "only_train": "intermediate", "moe": "intermediate",
    "num_experts": 2,
}  # fmt: skip
PREFIX = "model."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", rows(16)).parent


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_average_is_torchs_and_goes_on_after_a_resume(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = train_words(tiny_model_dir, data, out, **OPTIONS)
    said = run_training(words).stderr
    steps = [weights(out / f"checkpoint-{step}") for step in range(1, 5)]
    names = [name for name in steps[0] if ".intermediate.dense." in name]
    module = torch.nn.ParameterList([steps[0][name].clone() for name in names])
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for own in steps:
        with torch.no_grad():
            for parameter, name in zip(module, names, strict=True):
                parameter.copy_(own[name])
        average.update_parameters(module)
    kept = weights(out)
    for expected, name in zip(average.module, names, strict=True):
        torch.testing.assert_close(kept[name], expected.detach(), rtol=1e-6, atol=1e-7)
    assert any(not kept[name].allclose(steps[-1][name], atol=1e-4) for name in names), "not the last step's own"
    stored = load_file(out / "checkpoint-4" / EMA_FILE)
    assert {name.removeprefix(PREFIX) for name in stored} == set(names), "what is frozen has no average"
    numbers = sum(each.numel() for each in stored.values())
    assert f"weights averaged with decay 0.7: {numbers} parameters" in said

    lines = log_lines(out)
    for step in (3, 4):
        shutil.rmtree(out / f"checkpoint-{step}")
    run_training([*words, "--resume_from_checkpoint", "True"])
    assert [line["loss"] for line in log_lines(out)] == [line["loss"] for line in lines]
    assert all(kept[name].equal(value) for name, value in weights(out).items())
    answer = run_training([*words, "--resume_from_checkpoint", "True", "--ema_decay", "0.5"], check=False)
    assert answer.returncode == 2 and "--ema_decay: the checkpoint has 0.7, this run says 0.5" in answer.stderr


def test_what_is_evaluated_is_the_average_and_training_does_not_notice(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    dev = write_dev(tmp_path / "dev", "ko", 72)
    options = {"max_steps": 6, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "save_strategy": "no"}
    options |= {"eval_data_dir": dev, "eval_steps": 2, "load_best_model_at_end": True, "unified_finetuning": True}

    def run(name: str, model: Path = tiny_model_dir, **more: Any) -> Path:
        words = train_words(model, data, tmp_path / name, **{**options, **more})
        run_training([*words, "--eval_languages", "ko"])
        return tmp_path / name

    plain, averaged = run("plain", load_best_model_at_end=False), run("averaged", ema_decay=0.8)
    assert [line["loss"] for line in log_lines(plain)] == [line["loss"] for line in log_lines(averaged)]
    ours, own = dev_lines(averaged), dev_lines(plain)
    assert ours[0]["eval_ndcg@10"] == own[0]["eval_ndcg@10"]
    assert [line["eval_ndcg@10"] for line in ours[1:]] != [line["eval_ndcg@10"] for line in own[1:]]
    # What was left measures as it did while training.
    best = max(line["eval_ndcg@10"] for line in ours)
    again = run("again", averaged, max_steps=1, load_best_model_at_end=False, eval_steps=1)
    assert dev_lines(again)[0]["eval_ndcg@10"] == pytest.approx(best, abs=1e-12)
