"""Gradient accumulation: what is logged and what is stepped by is a mean over micro-batches, not their sum."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_loss_terms_and_gradient_are_means_over_micro_batches(
    engine: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Sixteen times one row: every micro-batch is the same, so that their number changes nothing."""
    write_rows(tmp_path / "data" / "one.jsonl", rows(2, negatives=2)[:1] * 16)
    lines = {}
    for copies in (1, 4):
        output = tmp_path / f"out-{copies}"
        run_training(train_words(
            tiny_model_dir, tmp_path / "data", output, max_steps=2, gradient_accumulation_steps=copies, engine=engine,
            learning_rate=1e-4, lr_scheduler_type="constant",
        ))  # fmt: skip
        lines[copies] = log_lines(output)
    for one, four in zip(lines[1], lines[4], strict=True):
        for name in ("loss", "contrastive_loss", "penalty", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=1e-3), name
        assert one["loss"] == pytest.approx(0.9 * one["contrastive_loss"] + 0.1 * one["penalty"], rel=1e-4)
    assert lines[1][0]["grad_norm"] > 1e-3


def test_a_step_of_two_micro_batches_logs_the_mean_of_both(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Different rows; the batches of a step of 1 x 2 rows taken one by one, with weights that do not move."""
    write_rows(tmp_path / "data" / "rows.jsonl", rows(16))
    options = {"per_device_train_batch_size": 1, "learning_rate": 0.0, "max_steps": 2}
    together, apart = tmp_path / "together", tmp_path / "apart"
    run_training(train_words(
        tiny_model_dir, tmp_path / "data", together, **options, gradient_accumulation_steps=2
    ))  # fmt: skip
    run_training(train_words(tiny_model_dir, tmp_path / "data", apart, **{**options, "max_steps": 4}))
    single = log_lines(apart)
    for step, line in enumerate(log_lines(together)):
        parts = single[2 * step : 2 * step + 2]
        for name in ("loss", "contrastive_loss", "penalty"):
            assert line[name] == pytest.approx(sum(part[name] for part in parts) / 2, rel=1e-4), name
    assert single[0]["loss"] != pytest.approx(single[1]["loss"], rel=1e-3)
