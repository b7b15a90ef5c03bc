"""``benchmarks/gpu.sh`` without a GPU: from end to end on the CPU, what it measures on a pretended device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import REPOSITORY
from conftest import write_tiny
from devices.pretended import PretendedDevice, move
from devices.test_training_step import Step, prepare
from finetune.helpers import rows, write_rows

CELLS = re.compile(r"[\d,]+ \| \d+% \| [\d.]* \| \d+ \|$")


@pytest.fixture(scope="module")
def fixture(tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``benchmarks/fixture.py`` makes it."""
    folder = tmp_path_factory.mktemp("fixture")
    for name, model in (("dense", tiny_model_dir), ("moe", tiny_moe_dir)):
        shutil.copytree(model, folder / name)
    write_rows(folder / "train" / "rows.jsonl", rows(12, negatives=8))
    return folder


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """``benchmarks/gpu_sweep.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import gpu_sweep
    return gpu_sweep


def test_the_script_goes_through_on_a_processor(fixture: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "TESTS": "tests/devices/test_memory.py"}
    words = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), fixture.name]
    done = subprocess.run(words, cwd=fixture.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ") and "tokens/s" not in line]
    ways = ["dense", "dense", "moe", "moe"]
    ways += ["all weights", "only intermediate", "2 experts, only intermediate", "gradient caching"]
    assert [line.split(" | ")[0] for line in lines] == [f"| {way}" for way in ways]
    assert all(CELLS.search(line) for line in lines), lines
    assert (fixture / "gpu.md").read_text("utf-8") == done.stdout


def test_encoding_is_measured_on_a_device(sweep: ModuleType, fixture: Path) -> None:
    with PretendedDevice():
        lines = list(sweep.encoding(fixture, "cuda:0", True, 1e12))
    assert len(lines) == 4
    assert all(CELLS.search(line) for line in lines), lines


def test_a_step_is_measured_on_a_device(sweep: ModuleType, fixture: Path) -> None:
    model, batch = prepare(fixture / "dense", Step())
    with PretendedDevice() as device:
        move(model)
        there: dict[str, Any] = {n: x.pin_memory().to(device.device, non_blocking=True) for n, x in batch.items()}
        cells = sweep.step_figures(model, there, fixture / "dense", "cuda:0", True, 1e12)
    assert CELLS.search(cells)


def test_what_does_not_fit_is_a_line(sweep: ModuleType, fixture: Path, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "xlmr")
    model, batch = prepare(folder, Step())
    with PretendedDevice(memory=50) as device:
        move(model)
        there: dict[str, Any] = {n: x.pin_memory().to(device.device, non_blocking=True) for n, x in batch.items()}
        cells = sweep.step_figures(model, there, folder, "cuda:0", True, 1e12)
    assert cells == "out of memory | | |"
    assert torch.is_grad_enabled()
