"""FSDP2 really switched on, on two processes of the CPU: the losses and gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import TORCHRUN, environment


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe": "intermediate"},
        {"moe": "output", "only_train": "output"},
        {"unified": True},
        {"engine": "padded"},
    ],
    ids=["dense", "experts", "frozen", "unified", "padded"],
)
def test_sharded_weights_train_as_whole_ones(options: dict[str, Any], tiny_model_dir: Path) -> None:
    worker = Path(__file__).with_name("sharding_worker.py")
    command = [sys.executable, *TORCHRUN, str(worker), str(tiny_model_dir), json.dumps(options)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "one process and two agree" in answer.stdout
