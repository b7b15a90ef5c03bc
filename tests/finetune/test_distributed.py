"""Two gloo processes under torchrun: gradients of cross-device negatives, and run.py itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune.helpers import environment, log_lines, rows, run_training, train_words, write_rows

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unified_finetuning": True, "use_self_distill": True},
        {"unified_finetuning": True, "teacher": True},
        {"normlized": False, "sentence_pooling_method": "mean", "engine": {"grad_cache": True, "slab_tokens": 32}},
        {"moe": "intermediate", "only_train": "intermediate", "num_experts": 2, "router_gradient": "straight_through"},
    ],
    ids=["dense", "unified-self-distill", "unified-teacher", "mean-grad-cache", "moe"],
)
def test_cross_device_gradient_is_the_one_process_gradient(options: dict, tiny_model_dir: Path) -> None:
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, *TORCHRUN, str(worker), str(tiny_model_dir), json.dumps(options)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "gradients agree" in answer.stdout


def test_run_under_torchrun_equals_one_process_with_the_whole_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Same rows a step, no neg_q for some: with cross-device negatives the losses are those of one big batch."""
    write_rows(tmp_path / "data" / "rows.jsonl", rows(16))
    options = {
        "max_steps": 3, "save_strategy": "steps", "save_steps": 3, "train_group_size": 5, "moe": "intermediate",
        "num_experts": 2,
    }  # fmt: skip
    two = tmp_path / "two"
    run_training(
        train_words(tiny_model_dir, tmp_path / "data", two, negatives_cross_device=True, **options), launcher=TORCHRUN
    )
    again = tmp_path / "again"  # a second run on the same host must find no port taken
    run_training(
        train_words(tiny_model_dir, tmp_path / "data", again, negatives_cross_device=True, **options), launcher=TORCHRUN
    )
    first, second = log_lines(two), log_lines(again)
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert all(line["grad_norm"] > 0 for line in first)
