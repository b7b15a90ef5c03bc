"""What a run does with the devices and the memory it finds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

from FlagEmbedding.finetune import runner
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.runner import build_trainer, one_device


def test_one_process_trains_on_one_of_several_devices(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer wraps a model in DataParallel where it counts several, which tears passages from their queries."""
    data = write_rows(tmp_path / "data" / "rows.jsonl", rows(8)).parent
    arguments = parse_arguments(train_words(tiny_model_dir, data, tmp_path / "out"))
    arguments.training._n_gpu = 4
    with caplog.at_level(logging.WARNING):
        one_device(arguments.training)
    assert "torchrun --nproc_per_node 4" in caplog.text
    trainer = build_trainer(arguments)
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)
    assert arguments.training.train_batch_size == arguments.training.per_device_train_batch_size


@pytest.mark.parametrize(
    ("divided_by", "engine"),
    [
        ({}, "packed"), ({"fsdp": ["full_shard"]}, "packed"), ({"deepspeed": "zero3.json"}, "padded"),
        ({"fsdp": ["full_shard"], "fsdp_config": {"version": 1}}, "padded"),
    ],
    ids=["nothing", "FSDP2", "DeepSpeed", "FSDP1"],
)  # fmt: skip
def test_the_engine_fits_what_divides_the_model(
    divided_by: dict[str, Any], engine: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an accelerator nothing can be divided here: the model is looked at as the Trainer would get it."""
    data = write_rows(tmp_path / "data" / "rows.jsonl", rows(8)).parent
    arguments = parse_arguments(train_words(tiny_model_dir, data, tmp_path / "out"))
    for name, value in divided_by.items():
        setattr(arguments.training, name, value)
    monkeypatch.setattr(runner, "BiEncoderTrainer", lambda **given: given["model"])
    model: Any = build_trainer(arguments)
    assert (model.engine.engine, model.sharded) == (engine, bool(divided_by))


def out_of_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slabs of more than ``tokens`` do not fit; gives the budgets that were tried."""
    tried: list[int] = []
    forward = BiEncoder.forward

    def limited(self: BiEncoder, *args: Any, **kwargs: Any) -> Any:
        tried.append(self.engine.slab_tokens or 0)
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("no room")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BiEncoder, "forward", limited)
    return tried


def test_out_of_memory_under_gradient_caching_halves_the_slab(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data" / "rows.jsonl", rows(8)).parent
    words = {"grad_cache": True, "slab_tokens": 4096, "max_steps": 3}
    run_training(train_words(tiny_model_dir, data, tmp_path / "whole", **words))
    tried = out_of_memory_above(1024, monkeypatch)
    run_training(train_words(tiny_model_dir, data, tmp_path / "halved", **words))
    assert tried == [4096, 2048, 1024, 1024, 1024]
    for halved, whole in zip(log_lines(tmp_path / "halved"), log_lines(tmp_path / "whole"), strict=True):
        assert halved["loss"] == pytest.approx(whole["loss"], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"grad_cache": True, "gradient_accumulation_steps": 2}], ids=str)
def test_out_of_memory_ends_in_one_line(
    options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data" / "rows.jsonl", rows(8)).parent
    out_of_memory_above(0, monkeypatch)
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", slab_tokens=4096, **options), check=False)
    assert answer.returncode == 2
    assert "out of memory at step 1: lower --per_device_train_batch_size, or add --grad_cache True" in answer.stderr
    assert "Traceback" not in answer.stderr
