"""run.py end to end: the published command, heads, distillation, accumulation, frozen parts, stops that name rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file

from FlagEmbedding.modeling.backbone import load_backbone


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train_data" / "rows.jsonl", rows(24)).parent


def final_state(output: Path) -> list[dict]:
    return log_lines(output)


def test_published_command_trains_only_the_experts(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The command as published but for paths and step count."""
    output = tmp_path / "CreaLabs" / "bge-m3-fa-CLPL-outputMoE"
    words = (
        f"--output_dir {output} --model_name_or_path {tiny_model_dir} --train_data {data} --learning_rate 1e-5 "
        "--fp16 y --num_train_epochs 2 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 "
        "--dataloader_drop_last True "
        "--normlized True --temperature 0.02 --query_max_len 128 --passage_max_len 512 --train_group_size 5 "
        "--logging_steps 1 --same_task_within_batch True --unified_finetuning False --use_self_distill False "
        "--only_train intermediate --moe intermediate --num_experts 2 --num_experts_per_tok 1 "
        "--save_steps 2 --max_steps 3"
    )
    answer = run_training(words.split())
    assert answer.stderr.count("--fp16 needs a GPU: going on in") == 1
    assert answer.stderr.count("routing stays random") == 1
    assert str(output) in answer.stdout.replace("\n", "")
    config = json.loads((output / "config.json").read_text())
    assert {k: config[k] for k in ("moe", "num_experts", "num_experts_per_tok", "only_train")} == {
        "moe": "intermediate", "num_experts": 2, "num_experts_per_tok": 1, "only_train": "intermediate",
    }  # fmt: skip
    before, after = load_file(tiny_model_dir / "model.safetensors"), load_file(output / "model.safetensors")
    for name, value in before.items():
        if ".intermediate.dense." not in name:
            assert torch.equal(value, after[name]), name
    for layer in range(2):
        stem = f"encoder.layer.{layer}.intermediate.dense"
        assert after[f"{stem}.gate.weight"].shape == (2, 32)
        kernels = [after[f"{stem}.experts.{e}.weight"] for e in range(2)]
        assert any(not torch.equal(kernel, before[f"{stem}.weight"]) for kernel in kernels)
    saved = torch.load(output / "checkpoint-2" / "optimizer.pt", weights_only=True)
    trained = [p for n, p in load_backbone(str(output)).named_parameters() if ".intermediate.dense." in n]
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(trained)


def test_losses_fall_and_router_is_reported(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_training(train_words(
        tiny_model_dir, data, output, max_steps=40, logging_steps=10, save_strategy="steps", save_steps=40,
        moe="output", num_experts=3, num_experts_per_tok=2, router_aux_loss_coef=0.05, router_z_loss_coef=0.01,
        temperature=0.05, learning_rate=3e-3, sentence_pooling_method="mean", per_device_train_batch_size=4,
    ))  # fmt: skip
    lines = final_state(output)
    assert lines[-1]["loss"] < lines[0]["loss"] * 0.8
    for line in lines:
        assert {"contrastive_loss", "penalty", "router_aux_loss", "router_z_loss"} <= line.keys()
        total = 0.9 * line["contrastive_loss"] + 0.1 * line["penalty"]
        total += line["router_aux_loss_scaled"] + line["router_z_loss_scaled"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert line["router_aux_loss_scaled"] == pytest.approx(0.05 * line["router_aux_loss"], rel=1e-5)
        assert len(line["router_load"]) == 2
        assert all(sum(layer) == pytest.approx(1, abs=1e-5) for layer in line["router_load"])
        assert 0 <= line["router_entropy"] <= math.log(3) + 1e-6
    assert all(0 <= line["router_changed"] <= 1 for line in lines)
    assert lines[-1]["router_changed"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"unified_finetuning": True, "use_self_distill": True, "self_distill_start_step": 1},
        {"unified_finetuning": True, "fix_encoder": True},
        {"unified_finetuning": True, "only_train": "output"},
        {"bf16": True, "gradient_checkpointing": True, "only_train": "intermediate"},
        {"grad_cache": True, "slab_tokens": 64},
        {"engine": "padded", "sentence_pooling_method": "mean", "normlized": False, "learning_rate": 1e-4},
        {"same_task_within_batch": False, "dataloader_num_workers": 2, "shuffle_ratio": 0.5},
        {"fix_position_embedding": True, "report_to": "tensorboard"},
    ],
    ids="-".join,
)
def test_every_way_of_training_moves_the_model(options, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_training(train_words(tiny_model_dir, data, output, save_strategy="steps", save_steps=4, **options))
    lines = final_state(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    if options.get("unified_finetuning"):
        for name in ("colbert_linear.pt", "sparse_linear.pt"):
            torch.load(output / name, weights_only=True)
    if options.get("report_to") == "tensorboard":
        assert list(output.rglob("events.out.tfevents*"))


def test_knowledge_distillation_with_and_without_unified(tiny_model_dir: Path, tmp_path: Path) -> None:
    records = rows(16)
    for i, record in enumerate(records):
        record["pos_scores"] = [2.0]
        record["neg_scores"] = [0.1 * ((i + j) % 5) for j in range(len(record["neg"]))]
    write_rows(tmp_path / "data" / "scored.jsonl", records)
    for unified in (False, True):
        output = tmp_path / f"out-{unified}"
        run_training(train_words(
            tiny_model_dir, tmp_path / "data", output, knowledge_distillation=True, unified_finetuning=unified,
            save_strategy="steps", save_steps=4,
        ))  # fmt: skip
        assert len(final_state(output)) == 4


def test_accumulated_copies_of_one_micro_batch_give_its_gradient(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One row, so that every micro-batch is the same; plain SGD then moves alike for 1 and for 4 copies."""
    write_rows(tmp_path / "data" / "one.jsonl", rows(2, negatives=2)[:1] * 16)
    states = []
    for copies in (1, 4):
        output = tmp_path / f"out-{copies}"
        run_training(train_words(
            tiny_model_dir, tmp_path / "data", output, max_steps=1, per_device_train_batch_size=2, optim="sgd",
            gradient_accumulation_steps=copies, max_grad_norm=0, learning_rate=0.01, lr_scheduler_type="constant",
        ))  # fmt: skip
        states.append(load_file(output / "model.safetensors"))
    start = load_file(tiny_model_dir / "model.safetensors")
    moved = 0.0
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-6)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-4


def test_a_moe_checkpoint_trains_on_without_being_told(tiny_moe_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_training(train_words(tiny_moe_dir, data, output, max_steps=1, learning_rate=0.0))
    before, after = load_file(tiny_moe_dir / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    answer = run_training(train_words(tiny_moe_dir, data, tmp_path / "no", moe="output", num_experts=2), check=False)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr


def test_zero_loss_for_ten_steps_stops_and_names_the_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A temperature so small that the softmax saturates: a loss of exactly 0 (queries equal to their passages)."""
    records = [{"query": p, "pos": [p], "neg": ["x", "z"]} for p in (r["pos"][0] for r in rows(8))]
    write_rows(tmp_path / "data" / "easy.jsonl", records)
    answer = run_training(
        train_words(
            tiny_model_dir, tmp_path / "data", tmp_path / "out", max_steps=40, per_device_train_batch_size=1,
            temperature=1e-5, learning_rate=0.0, query_max_len=48,
        ),
        check=False,
    )  # fmt: skip
    assert answer.returncode == 2
    assert "exactly 0 for 10 steps" in answer.stderr
    assert "easy.jsonl:" in answer.stderr
    assert "Traceback" not in answer.stderr
    # Steps count, not micro-batches: 16 of these are 8 steps.
    run_training(train_words(
        tiny_model_dir, tmp_path / "data", tmp_path / "out", max_steps=8, per_device_train_batch_size=1,
        temperature=1e-5, learning_rate=0.0, query_max_len=48, gradient_accumulation_steps=2,
    ))  # fmt: skip
    assert [line["loss"] for line in log_lines(tmp_path / "out")] == [0.0] * 8


def test_a_non_finite_loss_stops_and_names_the_rows(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    answer = run_training(
        train_words(tiny_model_dir, data, tmp_path / "out", max_steps=60, learning_rate=1e30, max_grad_norm=0),
        check=False,
    )
    assert answer.returncode == 2
    assert "the loss is nan at step" in answer.stderr
    assert "rows.jsonl:" in answer.stderr
    assert "Traceback" not in answer.stderr
