"""Every option of run.py acts: with another value something that is built, drawn, computed or trained differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny
from finetune.beyond import BEYOND, ELSEWHERE
from finetune.dev_data import write_dev
from finetune.helpers import rows, write_rows
from hub_cache import keep
from options_walk import Case, assert_acts, assert_complete
from transformers import TrainingArguments, set_seed

from FlagEmbedding.finetune.arguments import (
    DataArguments,
    EngineConfig,
    ModelArguments,
    MoEConfig,
    ObjectiveArguments,
    RefreshArguments,
    RetrieverTrainingArguments,
)
from FlagEmbedding.finetune.checks import check_arguments
from FlagEmbedding.finetune.dev.arguments import EvaluationArguments
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.refresh import RefreshNegatives
from FlagEmbedding.finetune.resume.fingerprint import compare, kind_of
from FlagEmbedding.finetune.runner import build_trainer
from FlagEmbedding.modeling import encoder as engine_module
from FlagEmbedding.modeling.adapter_options import LoraOptions
from FlagEmbedding.modeling.backbone import load_trained_state

GROUPS = (
    ModelArguments, MoEConfig, DataArguments, ObjectiveArguments, EngineConfig, RefreshArguments, EvaluationArguments,
    LoraOptions,
)  # fmt: skip
UNIFIED, MOE = "--unified_finetuning True", "--moe intermediate --num_experts 2"
LORA = "--lora_r 3"
SELF = f"{UNIFIED} --use_self_distill True"
REFRESH = "--refresh_negatives_every_n_epochs 1 --num_train_epochs 3"
DEV = "--eval_data_dir {dev} --eval_languages ko"
POOL = f"{DEV} --eval_corpus pool --eval_pool_mined 2 --eval_pool_random 3"
LOSS, ROWS, FIRST = ("loss",), ("drawn",), ("tokens",)

CASES = {
    # model
    "model_name_or_path": Case("--model_name_or_path {other}", only=LOSS),
    "config_name": Case("--config_name {other}", only=LOSS),  # dropout of 0.5 there
    "tokenizer_name": Case("--tokenizer_name {bert}", only=FIRST),
    "cache_dir": Case("--cache_dir {hub_b}", given="--model_name_or_path org/tiny --cache_dir {hub_a}", only=LOSS),
    "fix_position_embedding": Case("--fix_position_embedding", only=("trained", "moved")),
    "fix_encoder": Case("--fix_encoder", given=UNIFIED, only=("trained", "moved")),
    "sentence_pooling_method": Case("--sentence_pooling_method mean", only=LOSS),
    "normalize_embeddings": Case("--normlized False", only=LOSS),
    "colbert_dim": Case("--colbert_dim 8", given=UNIFIED, only=("shapes", "loss")),
    # experts
    "moe": Case("--moe output", given="--moe intermediate", only=("trained", "shapes")),
    "only_train": Case("--only_train output", only=("trained", "moved")),
    "num_experts": Case("--num_experts 3", given="--moe intermediate", only=("shapes",)),
    "num_experts_per_tok": Case("--num_experts_per_tok 2", given=MOE, only=("moved",)),
    "router_gradient": Case("--router_gradient straight_through", given=MOE, only=("moved",)),
    "router_jitter": Case("--router_jitter 0.5", given=f"{MOE} --router_aux_loss_coef 0.1", only=LOSS),
    # adapters
    "lora_r": Case("--lora_r 4", only=("trained", "shapes")),
    "lora_alpha": Case("--lora_alpha 64", given=LORA, only=("moved",)),
    "lora_dropout": Case("--lora_dropout 0.5", given=LORA, only=("moved",)),
    "lora_target": Case("--lora_target attention", given=LORA, only=("trained",)),
    "use_dora": Case("--use_dora", given=LORA, only=("trained", "moved")),
    "use_rslora": Case("--use_rslora", given=LORA, only=("moved",)),
    "lora_save": Case("--lora_save adapter", given=LORA, only=("saved",)),
    # data
    "train_data": Case("--train_data {other_rows}", only=ROWS),
    "knowledge_distillation": Case("--knowledge_distillation", given="--train_data {scored}", only=("drawn", "loss")),
    "cache_path": Case("--cache_path {other_cache}", only=("prepared",)),
    "train_group_size": Case("--train_group_size 4", only=ROWS),
    "query_max_len": Case("--query_max_len 6", only=FIRST),
    "passage_max_len": Case("--passage_max_len 9", only=FIRST),
    "max_example_num_per_dataset": Case("--max_example_num_per_dataset 5", only=("batches", "drawn")),
    "query_instruction_for_retrieval": Case("--query_instruction_for_retrieval 'find: '", only=("drawn", "tokens")),
    "passage_instruction_for_retrieval": Case("--passage_instruction_for_retrieval 'text: '", only=("drawn", "tokens")),
    "neg_q_instruction": Case(
        "--neg_q_instruction False", given="--query_instruction_for_retrieval 'find: '", only=("drawn", "tokens")
    ),
    "same_task_within_batch": Case("--same_task_within_batch True", only=("batches",)),
    "shuffle_ratio": Case("--shuffle_ratio 1.0", given="--train_data {long}", only=ROWS),
    "small_threshold": Case("--small_threshold 20", given="--same_task_within_batch True", only=("batches",)),
    "drop_threshold": Case(
        "--drop_threshold 30", given="--same_task_within_batch True --small_threshold 11", only=("batches",)
    ),
    "batch_size_by_length": Case(
        "--batch_size_by_length",
        given="--same_task_within_batch True --train_data {by_length} --train_group_size 8",
        only=("batches",),
    ),
    # objective
    "penalty_weight": Case("--penalty_weight 0.5", only=LOSS),
    "temperature": Case("--temperature 0.1", only=LOSS),
    "matryoshka_dims": Case("--matryoshka_dims 16 8", only=("loss", "terms")),
    "matryoshka_weights": Case("--matryoshka_weights 1 9", given="--matryoshka_dims 16 8", only=LOSS),
    "negatives_cross_device": Case("--negatives_cross_device", only=("warnings",)),  # losses: test_distributed.py
    "unified_finetuning": Case("--unified_finetuning True", only=("loss", "terms", "trained")),
    "use_self_distill": Case("--use_self_distill True", given=UNIFIED, only=("loss", "terms")),
    "self_distill_start_step": Case("--self_distill_start_step 1", given=SELF, only=("terms",)),
    "router_aux_loss_coef": Case("--router_aux_loss_coef 0.1", given=MOE, only=("loss", "moved")),
    "router_z_loss_coef": Case("--router_z_loss_coef 0.1", given=MOE, only=("loss", "moved")),
    **BEYOND,
    # engine: no loss depends on it, the calls do
    "engine": Case("--engine padded", only=("calls",)),
    "slab_tokens": Case("--slab_tokens 40", only=("calls",)),
    "grad_cache": Case("--grad_cache", only=("calls",)),
    "enable_sub_batch": Case(
        "--enable_sub_batch False",
        given="--engine padded --per_device_train_batch_size 8 --train_group_size 5",
        only=("calls",),
    ),
    # refresh
    "refresh_negatives_every_n_epochs": Case(
        "--refresh_negatives_every_n_epochs 2", given="--num_train_epochs 3", only=("refresh",)
    ),
    "refresh_corpus": Case("--refresh_corpus {corpus}", given=REFRESH, only=("refresh",)),
    "refresh_range_for_sampling": Case("--refresh_range_for_sampling 2-30", given=REFRESH, only=("refresh",)),
    "refresh_relative_margin": Case("--refresh_relative_margin 0.05", given=REFRESH, only=("refresh",)),
    # evaluation
    "eval_data_dir": Case("--eval_data_dir {dev_b}", given=DEV, only=("dev",)),
    "eval_languages": Case("--eval_languages ko fa", given=DEV, only=("dev",)),
    "eval_split": Case("--eval_split train", given=DEV, only=("dev",)),
    "eval_rows": Case("--eval_rows 6", given="--eval_rows 0.5", only=("dev", "batches")),
    "eval_corpus": Case("--eval_corpus pool", given=DEV, only=("dev", "args")),
    "eval_pool_mined": Case("--eval_pool_mined 9", given=POOL, only=("dev",)),
    "eval_pool_random": Case("--eval_pool_random 9", given=POOL, only=("dev",)),
    "eval_metrics": Case("--eval_metrics mrr@5 recall@1", given=DEV, only=("dev", "args")),
    "eval_query_length": Case("--eval_query_length 4", given=DEV, only=("dev",)),
    "eval_passage_length": Case("--eval_passage_length 4", given=DEV, only=("dev",)),
    "eval_with_title": Case("--eval_with_title", given=DEV, only=("dev",)),
    "early_stopping_patience": Case("--early_stopping_patience 2", given=DEV, only=("callbacks",)),
}

# Groups that are read by two rooms: each must hear of them.
ALSO = {
    "refresh queries": Case("--query_max_len 6", given=REFRESH, only=("refresh",)),
    "refresh passages": Case("--passage_max_len 9", given=REFRESH, only=("refresh",)),
    "refresh query instruction": Case("--query_instruction_for_retrieval q", given=REFRESH, only=("refresh",)),
    "refresh passage instruction": Case("--passage_instruction_for_retrieval p", given=REFRESH, only=("refresh",)),
    "refresh pooling": Case("--sentence_pooling_method mean", given=REFRESH, only=("refresh",)),
    "refresh normalization": Case("--normlized False", given=REFRESH, only=("refresh",)),
    "refresh precision": Case("--bf16", given=REFRESH, only=("refresh",)),
    "refresh seed": Case("--data_seed 5", given=REFRESH, only=("refresh",)),
    "cache_dir of the heads": Case(
        "--cache_dir {hub_b}", given=f"--model_name_or_path org/tiny --cache_dir {{hub_a}} {UNIFIED}", only=LOSS
    ),
    "no penalty": Case("--penalty_weight 0", only=("tokens", "terms")),
    "config of the router": Case("--router_jitter 0.5", given="--model_name_or_path {moe}", only=LOSS),
}

# Of Hugging Face's arguments the Trainer reads most by itself; these are read by our code, or set by it.
TRAINING = {
    "seed": Case("--seed 4", only=("drawn", "batches")),
    "data_seed": Case("--data_seed 5", only=("drawn", "batches")),
    "per_device_train_batch_size": Case("--per_device_train_batch_size 3", only=("batches",)),
    "dataloader_drop_last": Case(
        "--dataloader_drop_last True", given="--per_device_train_batch_size 6", only=("batches",)
    ),
    "dataloader_num_workers": Case("--dataloader_num_workers 1", only=("loader",)),
    "dataloader_prefetch_factor": Case(
        "--dataloader_prefetch_factor 3", given="--dataloader_num_workers 1", only=("loader",)
    ),
    "dataloader_persistent_workers": Case(
        "--dataloader_persistent_workers True", given="--dataloader_num_workers 1", only=("loader",)
    ),
    "gradient_checkpointing": Case("--gradient_checkpointing True", only=("args",)),  # test_activation_memory.py
    "warmup_ratio": Case("--warmup_ratio 0.5", only=("args",)),
    "learning_rate": Case("--learning_rate 0.1", only=("moved",)),
    "global_batch_size": Case("--global_batch_size 6", only=("batches", "args")),
    "ema_decay": Case("--ema_decay 0.9", only=("args", "callbacks")),
}
# What changes no number: a run goes on with another value.
HARMLESS = {
    "cache_path", "engine", "slab_tokens", "grad_cache", "enable_sub_batch", "dataloader_num_workers",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "gradient_checkpointing",
    "eval_data_dir", "early_stopping_patience", "lora_save",
}  # fmt: skip
# Their difference is named by what they bring.
BY_CONTENT = {"model_name_or_path", "config_name", "cache_dir"}


@pytest.fixture(scope="module")
def places(
    tiny_model_dir: Path, tiny_bert_dir: Path, tiny_moe_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Models, hubs and rows that the cases name."""
    base = tmp_path_factory.mktemp("walk")
    found = {"model": tiny_model_dir, "bert": tiny_bert_dir, "moe": tiny_moe_dir, "base": base}
    found["other"] = write_tiny(base / "other", "xlmr", hidden_dropout_prob=0.5, initializer_range=0.3)
    for hub, source in (("hub_a", tiny_model_dir), ("hub_b", found["other"])):
        found[hub] = keep(base / hub, "org/tiny", source)
    write_rows(base / "rows/a.jsonl", rows(16))
    found["rows"] = write_rows(base / "rows/b.jsonl", rows(10)).parent
    found["other_rows"] = write_rows(base / "others/a.jsonl", rows(16)[::-1]).parent
    scored = [{**row, "pos_scores": [3.0], "neg_scores": [0.0, 2.0, 1.0, 0.5]} for row in rows(16)]
    found["scored"] = write_rows(base / "scored/a.jsonl", scored).parent
    long = [{**row, "pos": [3 * row["pos"][0]], "neg": [3 * text for text in row["neg"]]} for row in rows(16)]
    found["long"] = write_rows(base / "long/a.jsonl", long).parent
    found["by_length"] = write_rows(base / "split/x_len-0-500.jsonl", rows(16)).parent
    found["corpus"] = base / "corpus.jsonl"
    found["corpus"].write_text(json.dumps({"docid": "1", "text": "Alone."}) + "\n")
    for name, seed in (("dev", 0), ("dev_b", 5)):
        found[name] = write_dev(base / name, "ko", 40, seed=seed)
        write_dev(base / name, "ko", 40, seed=seed, split="train", queries=9)
        write_dev(base / name, "fa", 30, seed=seed)
    found["other_cache"] = base / "other_cache"
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a slab went through the packed engine."""
    counted = {"packed": 0}
    forward = engine_module.packed_forward

    def packed_forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        counted["packed"] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine_module, "packed_forward", packed_forward)
    return counted


def observe(
    words: list[str], places: dict[str, Path], calls: dict[str, int], caplog: pytest.LogCaptureFixture
) -> dict[str, Any]:
    """Build all of a run by these words, draw, and train three forwards of it."""
    caplog.clear()
    calls["packed"] = 0
    standard = ["--model_name_or_path", "{model}", "--train_data", "{rows}", "--cache_path", "{base}/cache"]
    standard += ["--output_dir", "{base}/out", "--per_device_train_batch_size", "2", "--train_group_size", "3"]
    standard += ["--query_max_len", "24", "--passage_max_len", "48", "--learning_rate", "1e-3", "--seed", "3"]
    arguments = parse_arguments([word.format(**places) for word in [*standard, *words]])
    check_arguments(arguments)
    trainer = build_trainer(arguments)
    model, dataset = trainer.bare_model, trainer.train_dataset
    batches = list(trainer.batch_sampler)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_seed(1)
    loader = trainer.get_train_dataloader()
    padded = 0

    def count(*_: Any) -> None:
        nonlocal padded
        padded += 1

    model.model.register_forward_pre_hook(count)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=trainer.args.learning_rate)
    losses, terms, tokens = [], [], []
    for batch in take(loader, 3):
        tokens.append({k: (v.ids.tolist(), v.lengths) for k, v in batch.items() if hasattr(v, "lengths")})
        output = model.train()(**{k: v for k, v in batch.items() if k != "rows"})
        output.loss.backward()
        losses.append(float(output.loss))
        terms.append(sorted(output.terms))
        optimizer.step()
        optimizer.zero_grad()
    dev = None
    if arguments.evaluation.on:
        trainer.dev.prepare(model.eval())
        dev = [trainer.dev.measure(model, 0).keys()]
        for each in trainer.dev.collections:
            parts = each.query_tokens, each.passage_tokens
            tokens = [(part.max_length, [window.ids.tolist() for window in part.own.values()]) for part in parts]
            dev.append((each.docids, each.qrels, tokens))
    refreshers = [c for c in trainer.callback_handler.callbacks if isinstance(c, RefreshNegatives)]
    return {
        "drawn": [dataset[key] for batch in batches[:2] for key in batch],
        "batches": batches,
        "tokens": tokens,
        "prepared": dataset.files[0].table.cache_files,
        "trained": sorted(name for name, p in model.named_parameters() if p.requires_grad),
        "shapes": {name: tuple(p.shape) for name, p in model.named_parameters()},
        "moved": {name: (p.detach() - before[name]).double().norm().item() for name, p in model.named_parameters()},
        "saved": model.adapter,
        "loss": losses,
        "terms": terms,
        "calls": (calls["packed"], padded),
        "refresh": [(c.every, c.settings) for c in refreshers],
        "dev": dev,
        "callbacks": [type(c).__name__ for c in trainer.callback_handler.callbacks],
        "warnings": [r.getMessage() for r in caplog.records if r.levelname == "WARNING"],
        "loader": (loader.num_workers, loader.prefetch_factor, loader.persistent_workers),
        "args": {**vars(trainer.args), "logging_dir": None},
        "fingerprint": trainer.fingerprint,
    }


def take(loader: Any, count: int) -> Iterator[dict[str, Any]]:
    for number, batch in enumerate(loader):
        yield batch
        if number + 1 == count:
            return


def test_no_field_is_left_out() -> None:
    at_the_end = {"report": "test_report.py", "model_card": "test_model_card.py", "license": "test_model_card.py"}
    assert_complete(GROUPS, CASES, at_the_end | ELSEWHERE | {"eval_modes": "test_dev_modes.py"})
    ours = {f for f in RetrieverTrainingArguments.__annotations__ if f not in TRAINING}
    # Three are Hugging Face's with another default.
    assert ours == {
        "remove_unused_columns", "logging_nan_inf_filter", "ddp_find_unused_parameters",
        # test_runs.py, test_same_run.py, test_plan.py
        "overwrite_output_dir", "resume_anyway", "plan",
    }  # fmt: skip
    assert set(TRAINING) - {"warmup_ratio", "global_batch_size", "ema_decay"} <= set(
        TrainingArguments.__dataclass_fields__
    )


@pytest.mark.parametrize("name", [*CASES, *ALSO, *TRAINING])
def test_every_option_acts(
    name: str, places: dict[str, Path], calls: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    case = {**CASES, **ALSO, **TRAINING}[name]
    fingerprints = []

    def look(words: list[str]) -> dict[str, Any]:
        found = observe(words, places=places, calls=calls, caplog=caplog)
        fingerprints.append(found.pop("fingerprint"))
        return found

    assert_acts(case, look)
    # A run that goes on from a checkpoint of the other one says so by name, and is refused where numbers depend on it.
    found = compare(fingerprints[0].record(), fingerprints[1])
    assert bool(found.refused) == (name not in HARMLESS)
    if name in {**CASES, **TRAINING} and name not in BY_CONTENT:
        assert any(f"--{name}" in text for text in found.refused + found.harmless), found
    same = compare(fingerprints[1].record(), fingerprints[1])
    assert not same.refused and not same.harmless


# Hugging Face's options (and ours beside them) on which a run's numbers depend; all others are harmless, compared by
# what they come to, or of one start alone. A new option of transformers is decisive until it is looked at.
DECISIVE = {
    "metric_for_best_model",
    "ema_decay", "global_batch_size", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "tf32", "use_liger_kernel", "liger_kernel_config",
    "average_tokens_across_devices", "auto_find_batch_size", "ignore_data_skip", "seed",
    "restore_callback_states_from_checkpoint", "accelerator_config", "parallelism_config", "dataloader_drop_last",
    "dataloader_in_order", "remove_unused_columns", "train_sampling_strategy", "fsdp", "fsdp_config", "deepspeed",
}  # fmt: skip


def test_every_option_is_harmless_or_decides() -> None:
    """Each has been looked at: a new one stands in none of the lists."""
    training = {f.name: kind_of(f.name) for f in fields(RetrieverTrainingArguments) if f.init}
    assert {name for name, kind in training.items() if kind in ("decisive", "fixed")} <= DECISIVE
    assert {name for name in DECISIVE & set(training) if training[name] not in ("decisive", "fixed")} == set()
    ours = {f.name for group in GROUPS for f in fields(group)}
    assert {name for name in ours if kind_of(name) == "harmless"} == {
        "cache_dir", "cache_path", "engine", "slab_tokens", "grad_cache", "enable_sub_batch", "eval_data_dir",
        "early_stopping_patience", "report", "model_card", "license", "lora_save", "eval_modes",
    }  # fmt: skip
    assert {name for name in {*ours, *training} if kind_of(name) == "meaning"} == {
        "train_data", "refresh_corpus", "model_name_or_path", "config_name", "tokenizer_name", "num_train_epochs",
        "max_steps", "warmup_steps", "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps",
        "data_seed",
    }  # fmt: skip
    assert {name for name in training if kind_of(name) == "call"} == {
        "resume_from_checkpoint", "resume_anyway", "overwrite_output_dir", "local_rank", "hub_token",
        "enable_jit_checkpoint", "plan",
    }  # fmt: skip


def test_the_same_words_build_the_same(
    places: dict[str, Path], calls: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """What the walk looks at depends on nothing but the options: a difference is never chance."""
    words = [*UNIFIED.split(), *MOE.split()]
    one, two = (observe(words, places, calls, caplog) for _ in range(2))
    assert {part for part in one if one[part] != two[part]} <= {"args"}


def test_a_run_goes_by_the_trainers_arguments_as_parsed(places: dict[str, Path]) -> None:
    arguments = parse_arguments(
        f"--model_name_or_path {places['model']} --train_data {places['rows']} --output_dir {places['base']}/out "
        f"--cache_path {places['base']}/cache".split()
    )
    trainer = build_trainer(arguments)
    assert trainer.args is arguments.training
    recorded = trainer.train_arguments
    assert recorded["data"]["train_data"] == [str(places["rows"])]
    groups = {"model", "experts", "lora", "data", "objective", "engine", "refresh", "evaluation", "training"}
    assert groups | {"provenance"} == set(recorded)
    json.dumps(recorded)
    load_trained_state(trainer.bare_model, places["model"])
