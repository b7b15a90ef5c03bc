"""LoRA in run.py: what trains, checkpoints and their continuation, dev queries, several processes, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune.dev_data import dev_lines, write_dev
from finetune.helpers import TOGETHER, log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.live_encoder import LiveEncoder
from FlagEmbedding.inference.text_encoder import encode_texts

pytest.importorskip("peft")
LORA: dict[str, Any] = {"lora_r": 4, "learning_rate": 1e-2}
CHECKPOINTS: dict[str, Any] = {**LORA, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
MOE = {"moe": "intermediate", "num_experts": 2, "unified_finetuning": True, "use_dora": True, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data/a.jsonl", rows(24)).parent


def test_adapters_train_and_nothing_else(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """What is left loads as a plain checkpoint, in which the layers without adapters are the base's."""
    words = train_words(tiny_model_dir, data, tmp_path, **LORA, lora_target="attention", max_steps=2)
    answer = run_training(words)
    assert "LoRA of rank 4, alpha 8 in 8 linear layers: 2,048 parameters train" in answer.stderr
    assert "2,048 of " in answer.stderr  # the line of what trains, in the block at the start
    base, tuned = load_file(tiny_model_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert base.keys() == tuned.keys()
    moved = {name for name in base if not base[name].equal(tuned[name])}
    parts = ("self.query", "self.key", "self.value", "output.dense")
    assert moved == {f"encoder.layer.{n}.attention.{part}.weight" for n in (0, 1) for part in parts}


@pytest.mark.parametrize(
    "options",
    [{**MOE, "gradient_accumulation_steps": 2}, {"lora_save": "adapter", "grad_cache": True, "slab_tokens": 64}],
    ids=["experts and heads", "adapter alone"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    options: dict[str, Any], tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_training(train_words(tiny_model_dir, data, whole, **CHECKPOINTS, **options))
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_training(train_words(tiny_model_dir, data, resumed, **CHECKPOINTS, **options, resume_from_checkpoint=True))
    assert log_lines(resumed) == log_lines(whole)
    place = "." if options.get("lora_save") else "adapter"
    names = [f"{place}/adapter_model.safetensors", "sparse_linear.pt", "model.safetensors"]
    there = [name for name in names if (whole / name).is_file()]
    assert len(there) == (1 if options.get("lora_save") else 3)
    for name in there:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    encoded = FlagModel(str(whole)).encode(["The tower of Shiraz"])
    np.testing.assert_array_equal(FlagModel(str(resumed)).encode(["The tower of Shiraz"]), encoded)


def test_another_rank_or_base_is_another_run(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    words = train_words(base, data, tmp_path / "out", **{**CHECKPOINTS, "max_steps": 2})
    run_training(words)
    assert "--lora_r" in run_training([*words, "--resume_from_checkpoint", "y", "--lora_r", "5"], check=False).stderr
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    answer = run_training([*words, "--resume_from_checkpoint", "True", "--resume_anyway"], check=False)
    assert answer.returncode == 2
    assert "weights of --model_name_or_path" in answer.stderr


def test_memory_options_change_no_loss(tiny_dropout_dir: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for number, more in enumerate(({}, {"gradient_checkpointing": True})):
        words = train_words(tiny_dropout_dir, data, tmp_path / str(number), **LORA, **more, max_steps=2)
        run_training([*words, "--save_strategy", "no"])
        losses.append([line["loss"] for line in log_lines(tmp_path / str(number))])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_the_best_evaluation_is_what_is_left(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    dev = write_dev(tmp_path / "dev", "ko", 72)
    options = {**LORA, "learning_rate": 5e-2, "max_steps": 6, "eval_steps": 2, "load_best_model_at_end": True}
    words = train_words(tiny_model_dir, data, tmp_path / "out", eval_data_dir=dev, **options)
    run_training([*words, "--eval_languages", "ko", "--lr_scheduler_type", "constant"])
    lines = dev_lines(tmp_path / "out")
    best = max(lines, key=lambda line: line["eval_ndcg@10"])
    assert len({line["eval_ndcg@10"] for line in lines}) > 1
    there = tmp_path / "out" / f"checkpoint-{best['step']}" if best["step"] else tiny_model_dir
    kept, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", there))
    assert all(kept[name].equal(expected[name]) for name in expected)


def test_a_model_in_training_encodes_as_its_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = parse_arguments(
        f"--model_name_or_path {tiny_model_dir} --train_data d --output_dir o --lora_r 3 --use_dora".split()
    )
    model = BiEncoder(arguments.model, arguments.experts, arguments.objective, arguments.engine, lora=arguments.lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save(str(tmp_path))
    live = LiveEncoder(model, model.tokenizer, EncoderArguments(encoder="live"))
    expected = FlagModel(str(tmp_path)).encode(["The tower of Shiraz"])
    np.testing.assert_array_equal(encode_texts(live, ["The tower of Shiraz"], 512), expected)
    assert any("lora_A" in name for name, _ in model.named_parameters())  # the model itself is as it was


def test_two_processes_train_as_one(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = {**LORA, "moe": "output", "num_experts": 3, "max_steps": 2, "weight_decay": 0.0}
    one, two = tmp_path / "one", tmp_path / "two"
    run_training(train_words(tiny_model_dir, data, one, **options, global_batch_size=4, per_device_train_batch_size=4))
    words = train_words(tiny_model_dir, data, two, **options, global_batch_size=4, negatives_cross_device=True)
    run_training(words, launcher=TOGETHER)
    assert [line["loss"] for line in log_lines(two)] == pytest.approx(
        [line["loss"] for line in log_lines(one)], abs=2e-5
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_r 4 --fix_encoder --unified_finetuning True", "--lora_r adapts the encoder"),
        ("--lora_r 4 --fix_position_embedding", "--fix_position_embedding has no effect with --lora_r"),
        ("--lora_r 4 --moe output --num_experts 2 --lora_target attention", "leaves all experts the same"),
        ("--lora_r 4 --moe output --num_experts 2 --lora_save adapter", "--lora_save merged"),
        ("--lora_alpha 4", "--lora_alpha has no effect without --lora_r"),
        ("--lora_r 4 --lora_target quary", "--lora_target quary: no linear layer"),
    ],
)
def test_refused_in_one_line(words: str, message: str, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    answer = run_training([*train_words(tiny_model_dir, data, tmp_path / "out"), *words.split()], check=False)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
