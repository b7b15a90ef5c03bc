"""The block at the start of a run says what then happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from finetune.helpers import TOGETHER, rows, run_training, train_words, write_rows
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "b.jsonl", rows(9))
    return write_rows(folder / "a.jsonl", rows(14)).parent


def block(stderr: str) -> dict[str, str]:
    """Its lines by their names; there is one block."""
    (text,) = re.findall(r"this run:\n((?:  \w+ +.*\n)+)", stderr)
    return dict(line.split(None, 1) for line in text.splitlines())


def test_the_block_says_what_then_happens(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(
        tiny_model_dir, data, tmp_path / "out", max_steps=None, num_train_epochs=2, gradient_accumulation_steps=3,
        moe="intermediate", num_experts=2, only_train="intermediate", sentence_pooling_method="mean",
        normlized=False, hub_token=None, warmup_ratio=0.5, penalty_weight=0,
    )  # fmt: skip
    said = block(run_training(words).stderr)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")
    trained = sum(t.numel() for name, t in tensors.items() if ".intermediate.dense." in name)
    whole = sum(t.numel() for t in tensors.values())
    steps, per_epoch = state["global_step"], state["global_step"] // 2
    assert said["model"] == f"{tiny_model_dir} (mean, not normalized, fp32)"
    assert said["trained"] == f"{trained:,} of {whole:,} parameters"
    assert said["rows"] == f"23 of {data}, as 2 task(s)"
    assert said["tokens"] == "up to 24 of a query, 48 of each of 3 passages"
    assert said["step"] == "6 queries: 2 at a time x 1 process(es) x 3 accumulated"
    assert said["steps"] == f"{steps}, {per_epoch} per epoch; rate 0.001, linear, {-(-steps // 2)} of warmup"
    assert said["output"] == f"{tmp_path}/out, checkpoints at the end alone"
    changed = set(re.findall(r"--(\S+)", said["changed"]))
    assert changed == {
        "sentence_pooling_method", "normalize_embeddings", "moe", "only_train", "num_experts", "train_group_size",
        "query_max_len", "passage_max_len", "same_task_within_batch", "penalty_weight", "learning_rate",
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps",
        "logging_steps", "save_strategy", "disable_tqdm", "report",
    }  # fmt: skip


def test_two_processes_say_it_once(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=5)
    said = block(run_training(words, launcher=TOGETHER).stderr)
    assert said["step"] == "4 queries: 2 at a time x 2 process(es) x 1 accumulated"
    assert said["steps"].startswith("2, ") and said["output"].endswith("checkpoints every 5 steps")
