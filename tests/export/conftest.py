"""A tiny checkpoint with BGE-M3's two heads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_m3_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny XLM-R with random heads."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-m3"
    shutil.copytree(tiny_model_dir, folder)
    torch.manual_seed(5)
    torch.save(torch.nn.Linear(32, 16).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder
