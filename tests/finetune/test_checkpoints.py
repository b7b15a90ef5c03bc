"""The state between two log lines, and what marks a checkpoint as whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from FlagEmbedding.finetune.resume.checkpoints import resumable
from FlagEmbedding.finetune.resume.loss_window import LossWindow
from FlagEmbedding.utils.errors import UsageError


def terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


def test_a_window_holds_means_of_the_micro_batches_that_have_a_term(tmp_path: Path) -> None:
    window = LossWindow()
    window.add(terms(loss=9.0, contrastive_loss=1.0, penalty=0.5))
    window.add(terms(loss=9.0, contrastive_loss=2.0))
    window.saw(zero=True)
    window.saw(zero=True)
    accelerator = Accelerator(cpu=True)
    assert window.totals(accelerator) == {"contrastive_loss": (3.0, 2), "penalty": (0.5, 1)}
    window.save(tmp_path, window.totals(accelerator), forwards=7)
    second = LossWindow()
    assert second.load(tmp_path, torch.device("cpu"), main=False) == {"forwards": 7}
    assert second.totals(accelerator) == {}, "the main process alone goes on with the sums of all"
    assert second.zero_micro_batches == 2
    again = LossWindow()
    assert again.load(tmp_path / "nowhere", torch.device("cpu")) is None
    assert again.load(tmp_path, torch.device("cpu")) == {"forwards": 7}
    for each in (window, again):
        assert each.zero_micro_batches == 2
        each.add(terms(contrastive_loss=6.0))
        assert each.flush(Accelerator(cpu=True)) == {"contrastive_loss": 3.0, "penalty": 0.5}
        each.add(terms(contrastive_loss=4.0))
        assert each.flush(Accelerator(cpu=True)) == {"contrastive_loss": 4.0}, "a new window starts from zero"


def test_zeros_are_counted_in_a_row() -> None:
    window = LossWindow()
    for zero, expected in ((True, 1), (True, 2), (False, 0), (True, 1)):
        window.saw(zero)
        assert window.zero_micro_batches == expected


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def test_the_newest_is_the_highest_number(tmp_path: Path) -> None:
    assert resumable(True, tmp_path) == []
    for number in (2, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{number}")
    write_checkpoint(tmp_path / "checkpoint-11-old")
    newest_first = [tmp_path / f"checkpoint-{number}" for number in (10, 9, 2)]
    for yes in (True, "y", "yes", "1", "TRUE"):
        assert resumable(yes, tmp_path) == newest_first
    assert resumable(str(tmp_path / "checkpoint-2"), tmp_path) == [tmp_path / "checkpoint-2"]
    for no in (None, False, "False", "n", "no", "0"):
        assert resumable(no, tmp_path) == []
    with pytest.raises(UsageError, match=r"checkpoint-3: not a whole checkpoint \(no such folder\)"):
        resumable(str(tmp_path / "checkpoint-3"), tmp_path)


def test_a_sharded_checkpoint_is_whole_by_its_state_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    for name in ("optimizer.pt", "model.safetensors"):
        (folder / name).unlink()
    assert resumable(True, tmp_path) == []
    assert resumable(True, tmp_path, sharded=True) == [folder]
    (folder / "trainer_state.json").write_text('{"epoch": ')
    assert resumable(True, tmp_path, sharded=True) == []
