"""FSDP2 really switched on, on two processes of the CPU: the losses and gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import TORCHRUN, environment

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"moe": "intermediate"},
    "frozen": {"moe": "output", "only_train": "output"},
    "unified": {"unified": True},
    "padded": {"engine": "padded"},
}


@pytest.fixture(scope="module")
def compared(tiny_model_dir: Path) -> subprocess.CompletedProcess[str]:
    """All cases, one after the other in the same two processes."""
    worker = Path(__file__).with_name("sharding_worker.py")
    command = [sys.executable, *TORCHRUN, str(worker), str(tiny_model_dir), json.dumps(CASES)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_train_as_whole_ones(case: str, compared: subprocess.CompletedProcess[str]) -> None:
    assert f"{case}: one process and two agree" in compared.stdout, compared.stderr[-3000:]


def test_both_processes_ended_well(compared: subprocess.CompletedProcess[str]) -> None:
    assert compared.returncode == 0, compared.stderr[-3000:]
