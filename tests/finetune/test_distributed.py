"""Two gloo processes under torchrun: gradients of cross-device negatives, and run.py itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from finetune.helpers import TOGETHER, TORCHRUN, environment, log_lines, rows, run_training, train_words, write_rows

CASES = {
    "dense": {},
    "unified-self-distill": {"unified_finetuning": True, "use_self_distill": True},
    "unified-teacher": {"unified_finetuning": True, "teacher": True},
    "mean-grad-cache": {
        "normlized": False, "sentence_pooling_method": "mean", "engine": {"grad_cache": True, "slab_tokens": 32},
    },
    "moe": {
        "moe": "intermediate", "only_train": "intermediate", "num_experts": 2, "router_gradient": "straight_through",
    },
    "neg_q on 0": {"neg_q_on_rank": 0},
    "neg_q on 1": {"neg_q_on_rank": 1},
    "masks": {"beyond": {"mask_twins": True, "false_negative_margin": 0.0, "neg_q_as_rows": True}},
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny_model_dir: Path) -> subprocess.CompletedProcess[str]:
    """All cases, one after the other in the same two processes."""
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, *TORCHRUN, str(worker), str(tiny_model_dir), json.dumps(CASES)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)


@pytest.mark.parametrize("case", CASES)
def test_cross_device_gradient_is_the_one_process_gradient(
    case: str, compared: subprocess.CompletedProcess[str]
) -> None:
    assert f"{case}: gradients agree" in compared.stdout, compared.stderr[-3000:]


def test_both_processes_ended_well(compared: subprocess.CompletedProcess[str]) -> None:
    assert compared.returncode == 0, compared.stderr[-3000:]


def test_run_under_torchrun_equals_one_process_with_the_whole_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Same rows a step: with cross-device negatives the losses are those of one big batch."""
    write_rows(tmp_path / "data" / "rows.jsonl", rows(16))
    options = {"max_steps": 3, "train_group_size": 5, "moe": "intermediate", "num_experts": 2}
    two, one = tmp_path / "two", tmp_path / "one"
    run_training(
        train_words(tiny_model_dir, tmp_path / "data", two, negatives_cross_device=True, **options), launcher=TORCHRUN
    )
    run_training(train_words(tiny_model_dir, tmp_path / "data", one, per_device_train_batch_size=4, **options))
    for both, alone in zip(log_lines(two), log_lines(one), strict=True):
        for name in ("loss", "contrastive_loss", "penalty", "grad_norm"):
            assert both[name] == pytest.approx(alone[name], rel=1e-4), name


def test_a_resumed_run_logs_the_means_of_the_uninterrupted_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two processes, a checkpoint between two log lines: each process's part of the window goes on."""
    records = rows(16)
    for record in records[::2]:
        del record["neg_q"]
    write_rows(tmp_path / "data" / "rows.jsonl", records)
    options = {"per_device_train_batch_size": 1, "max_steps": 6, "logging_steps": 4, "save_steps": 3}
    options |= {"save_strategy": "steps", "save_total_limit": None}
    words = train_words(tiny_model_dir, tmp_path / "data", tmp_path / "out", **options)
    run_training(words, launcher=TOGETHER)
    expected = log_lines(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    run_training([*words, "--resume_from_checkpoint", "True"], launcher=TOGETHER)
    assert [line["step"] for line in expected] == [4]
    for name in ("loss", "contrastive_loss", "penalty"):
        assert log_lines(tmp_path / "out")[0][name] == pytest.approx(expected[0][name], rel=1e-6), name


def test_logged_terms_are_means_over_processes(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Each process has its own row, and often only one of them a penalty. Weights do not move, so steps compare.

    Also a second start on the same host, which must find no port taken.
    """
    records = rows(16)
    for record in records[::2]:
        del record["neg_q"]
    write_rows(tmp_path / "data" / "rows.jsonl", records)
    two, one = tmp_path / "two", tmp_path / "one"
    options = {"learning_rate": 0.0}
    words = train_words(
        tiny_model_dir, tmp_path / "data", two, per_device_train_batch_size=1, max_steps=7, **options
    )  # fmt: skip
    run_training(words, launcher=TOGETHER)
    run_training(
        train_words(tiny_model_dir, tmp_path / "data", one, per_device_train_batch_size=2, max_steps=8, **options)
    )
    both, alone = log_lines(two), log_lines(one)
    # The penalty knows no other rows of the batch: it is the same in one process that holds both rows. (An epoch of one
    # process has a step more: a step of the last two rows.)
    penalties, expected = ([line.get("penalty", -1.0) for line in lines] for lines in (both, alone))
    assert any(penalties == pytest.approx(expected[:i] + expected[i + 1 :], rel=1e-4) for i in range(8))
    # Where there is no penalty, the contrastive loss is all there is, and the Trainer itself averages the loss.
    plain = [line for line in both if "penalty" not in line]
    assert 1 <= len(plain) <= 4
    for line in plain:
        assert line["contrastive_loss"] == pytest.approx(line["loss"], rel=1e-4)
