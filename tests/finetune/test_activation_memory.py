"""--gradient_checkpointing and --grad_cache do keep less: what autograd saves in a forward of run.py is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from torch.autograd.graph import saved_tensors_hooks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(24)).parent


def train_and_count(model: Path, data: Path, output: Path, **options: Any) -> tuple[int, list[float]]:
    """Bytes that autograd keeps for the backward (what a checkpointed part recomputes is not kept), and the losses."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run_training(train_words(model, data, output, max_steps=2, per_device_train_batch_size=4, **options))
    return kept, [line["loss"] for line in log_lines(output)]


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_gradient_checkpointing_keeps_little_and_changes_no_loss(
    engine: str, tiny_dropout_dir: Path, data: Path, tmp_path: Path
) -> None:
    plain, losses = train_and_count(tiny_dropout_dir, data, tmp_path / "plain", engine=engine)
    less, same = train_and_count(tiny_dropout_dir, data, tmp_path / "less", engine=engine, gradient_checkpointing=True)
    assert less < 0.5 * plain
    assert same == losses


def test_grad_cache_keeps_little_and_changes_no_loss(tiny_dropout_dir: Path, data: Path, tmp_path: Path) -> None:
    plain, losses = train_and_count(tiny_dropout_dir, data, tmp_path / "plain", slab_tokens=64)
    less, same = train_and_count(tiny_dropout_dir, data, tmp_path / "less", slab_tokens=64, grad_cache=True)
    assert less < 0.5 * plain
    assert same == losses
