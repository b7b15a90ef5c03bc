"""Small training files and the real command, shared by the training tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import REPOSITORY, run_script, run_together

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import TrainDataset

NOUNS = [
    "river",
    "mountain",
    "temple",
    "bridge",
    "forest",
    "harbour",
    "desert",
    "castle",
    "island",
    "valley",
    "lake",
    "tower",
]
PLACES = ["Seoul", "Isfahan", "Varanasi", "Busan", "Shiraz", "Jaipur"]


def rows(count: int = 24, negatives: int = 4, neg_q: bool = True) -> list[dict[str, Any]]:
    """Training rows about nouns in places; every negative answers its own query."""
    pairs = [(noun, place) for place in PLACES for noun in NOUNS]

    def passage(i: int) -> str:
        noun, place = pairs[i % len(pairs)]
        return f"The {noun} of {place} is number {i % 7} among its kind, and people visit the {noun} in month {i % 12}."

    def question(i: int) -> str:
        noun, place = pairs[i % len(pairs)]
        return f"When do people visit the {noun} of {place}?"

    found = []
    for i in range(count):
        others = [i + 1 + 5 * j for j in range(negatives)]
        row: dict[str, Any] = {"query": question(i), "pos": [passage(i)], "neg": [passage(j) for j in others]}
        if neg_q:
            row["neg_q"] = [question(j) for j in others]
        found.append(row)
    return found


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def opened(paths: Sequence[Path], options: DataArguments, seed: int = 7) -> TrainDataset:
    """The rows of ``paths``, drawn as ``options`` say."""
    return TrainDataset(replace(options, train_data=[str(path) for path in paths]), seed)


def train_words(model: Path, data: Path, output: Path, **options: Any) -> list[str]:
    """Words of a run.py command; an option of None is left out."""
    settings: dict[str, Any] = {
        "model_name_or_path": model, "train_data": data, "output_dir": output, "learning_rate": 1e-3, "max_steps": 4,
        "per_device_train_batch_size": 2, "train_group_size": 3, "query_max_len": 24, "passage_max_len": 48,
        "logging_steps": 1, "same_task_within_batch": True, "save_strategy": "no", "disable_tqdm": True,
        "report": False, **options,
    }  # fmt: skip
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


TOGETHER = ["two processes, without torchrun"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_training(
    words: list[str], launcher: list[str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """run.py with these words: in this process, in two (``TOGETHER``), or in those of a launcher such as torchrun."""
    if launcher is None:
        answer = run_script("run.py", words)
    elif launcher == TOGETHER:
        answer = run_together("run.py", words, environment())
    else:
        command = [sys.executable, *launcher, str(REPOSITORY / "run.py"), *words]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    if check:
        assert answer.returncode == 0, answer.stderr[-3000:]
    return answer


def log_lines(output: Path) -> list[dict[str, Any]]:
    """Loss lines of the newest trainer_state.json under ``output``."""
    states = sorted(output.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"]
    return [line for line in history if "loss" in line]
