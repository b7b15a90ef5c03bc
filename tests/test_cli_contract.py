"""The published flags are pinned: a script that worked with the published code parses here, with the same defaults."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from FlagEmbedding.evaluation.arguments import (
    CollectionArguments,
    CompareArguments,
    DevArguments,
    ScoreArguments,
    SearchArguments,
)
from FlagEmbedding.export.arguments import (
    FoldArguments,
    OnnxArguments,
    SampleArguments,
    SourceArguments,
    VectorArguments,
)
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.indexing.arguments import IndexArguments, ModeArguments, ShareArguments, StoreArguments
from FlagEmbedding.indexing.ray import RayArguments
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.merge.arguments import MergeArguments
from FlagEmbedding.utils.cli import flag_values, parse
from paper_table.command import ReproduceArguments, TrainOverrides

REPOSITORY = Path(__file__).resolve().parents[1]

TRAIN = (
    "--output_dir CreaLabs/bge-m3-fa-CLPL-outputMoE --model_name_or_path BAAI/bge-m3 --train_data ./train_data "
    "--learning_rate 1e-5 --fp16 y --num_train_epochs 2 --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 4 --dataloader_drop_last True --normlized True --temperature 0.02 "
    "--query_max_len 128 --passage_max_len 512 "
    "--train_group_size 5 --logging_steps 10 --same_task_within_batch True --unified_finetuning False "
    "--use_self_distill False --only_train intermediate --moe intermediate --num_experts 2 --num_experts_per_tok 1"
)

PUBLISHED_DEFAULTS = {
    "config_name": None, "tokenizer_name": None, "cache_dir": None, "moe": None, "only_train": None, "num_experts": 1,
    "num_experts_per_tok": 1, "knowledge_distillation": False, "cache_path": None, "train_group_size": 8,
    "query_max_len": 32, "passage_max_len": 128, "max_example_num_per_dataset": None,
    "query_instruction_for_retrieval": None, "passage_instruction_for_retrieval": None, "same_task_within_batch": False,
    "shuffle_ratio": 0.0, "small_threshold": 0, "drop_threshold": 0, "negatives_cross_device": False,
    "temperature": 0.02, "fix_position_embedding": False, "fix_encoder": False, "sentence_pooling_method": None,
    "normalize_embeddings": None, "enable_sub_batch": True, "unified_finetuning": False, "use_self_distill": False,
    "colbert_dim": -1, "self_distill_start_step": -1,
}  # fmt: skip
OURS = {
    "penalty_weight": 0.1, "router_gradient": "none", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0,
    "router_jitter": 0.0, "global_batch_size": None, "resume_anyway": False,
    "mask_twins": False, "false_negative_margin": None, "margin_strategy": "absolute", "guide_model": None,
    "distill_temperature": 1.0, "distill_loss": "published", "neg_q_control": "none", "neg_q_as_rows": False,
    "router": "learned", "ema_decay": None,
    "plan": False, "model_card": True, "license": None,
}  # fmt: skip
MINIMAL = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]


def flat(arguments) -> dict[str, object]:
    return {name: value for part in vars(arguments).values() for name, value in vars(part).items()}


def test_the_published_command_parses_as_written() -> None:
    values = flat(parse_arguments(shlex.split(TRAIN)))
    expected = {
        "model_name_or_path": "BAAI/bge-m3", "train_data": ["./train_data"], "learning_rate": 1e-5,
        "num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        "dataloader_drop_last": True, "normalize_embeddings": True, "temperature": 0.02, "query_max_len": 128,
        "passage_max_len": 512, "train_group_size": 5, "logging_steps": 10, "same_task_within_batch": True,
        "unified_finetuning": False, "use_self_distill": False, "only_train": "intermediate", "moe": "intermediate",
        "num_experts": 2, "num_experts_per_tok": 1, "penalty_weight": 0.1,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected


def test_defaults_are_the_published_ones() -> None:
    values = flat(parse_arguments(MINIMAL))
    assert {name: values[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    assert {name: values[name] for name in OURS} == OURS


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--normlized", "False"], "normalize_embeddings", False),
        (["--normalize_embeddings", "n"], "normalize_embeddings", False),
        (["--bf16"], "bf16", True),
        (["--bf16", "y"], "bf16", True),
        (["--overwrite_output_dir"], "overwrite_output_dir", True),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--train_data", "a", "b"], "train_data", ["a", "b"]),
        (["--report_to", "tensorboard"], "report_to", ["tensorboard"]),
    ],
)
def test_spellings(words: list[str], name: str, value: object) -> None:
    assert flat(parse_arguments([*MINIMAL, *words]))[name] == value


def test_fp16_without_a_gpu_goes_on_with_one_clear_line(caplog: pytest.LogCaptureFixture) -> None:
    for words in (["--fp16"], ["--fp16", "y"], ["--fp16", "True"]):
        caplog.clear()
        values = flat(parse_arguments([*MINIMAL, *words, "--use_cpu"]))
        assert values["fp16"] is False
        lines = [r.getMessage() for r in caplog.records if "--fp16" in r.getMessage()]
        assert len(lines) == 1
        assert lines[0].endswith("bf16" if values["bf16"] else "fp32")


def test_a_recipe_file_says_the_same_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ntrain_data: [a, b]\noutput_dir: o\n"
        "normlized: false\nlearning_rate: 1.0e-5\ncache_dir: null\n"
    )
    values = flat(parse_arguments([str(recipe), "--learning_rate", "3e-5"]))
    assert values["train_data"] == ["a", "b"]
    assert values["normalize_embeddings"] is False
    assert values["learning_rate"] == 3e-5
    as_json = tmp_path / "recipe.json"
    as_json.write_text(
        '{"model_name_or_path": "m", "train_data": ["a"], "output_dir": "o", "moe": "output", "num_experts": 3}'
    )
    values = flat(parse_arguments([str(as_json)]))
    assert (values["moe"], values["num_experts"]) == ("output", 3)


def test_help_is_grouped_and_names_every_published_flag() -> None:
    answer = subprocess.run(
        [sys.executable, REPOSITORY / "run.py", "--help"], capture_output=True, text=True, check=True, cwd="/"
    )
    for group in ("Model", "Experts", "Training data", "Objective", "Engine", "Hugging Face TrainingArguments"):
        assert f"\n{group}" in answer.stdout
    for name in (*PUBLISHED_DEFAULTS, *OURS, "model_name_or_path", "train_data", "normlized"):
        assert f"--{name}" in answer.stdout
    assert answer.stdout.index("--moe ") < answer.stdout.index("--learning_rate")


TOOLS = {
    "convert": {
        "format": "triples", "input": ["i"], "data_dir": None, "language": None, "split": "train",
        "negatives": "judged", "with_title": None, "cache_dir": None, "output_file": "o", "overwrite": False,
    },
    "merge": {"input_file": ["i"], "keep_repeated": False, "output_file": "o", "overwrite": False},
    "sample": {
        "input_file": ["i"], "number": 3, "share": None, "seed": 42, "output_file": "o", "overwrite": False,
    },
    "score": {
        "input_file": ["i"], "cache_dir": None, "trust_remote_code": False, "cross_encoder": "r",
        "cross_encoder_max_length": 512, "cross_encoder_batch_size": 32, "output_file": "o", "overwrite": False,
    },
    "split_data_by_length": {
        "input_path": "i", "output_dir": "o", "cache_dir": None, "log_name": ".split_log",
        "length_list": [0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000], "model_name_or_path": "BAAI/bge-m3",
        "num_proc": 16, "overwrite": False,
    },
}  # fmt: skip
GIVEN = {
    "convert": "--format triples --input i --output_file o", "merge": "--input_file i --output_file o",
    "score": "--input_file i --reranker r --output_file o",
    "sample": "--input_file i --number 3 --output_file o", "split_data_by_length": "--input_path i --output_dir o",
}  # fmt: skip


@pytest.mark.parametrize("command", TOOLS)
def test_the_flags_and_defaults_of_the_row_tools(command: str) -> None:
    module = import_module(f"FlagEmbedding.mining.{command}")
    groups = [kind for kind in vars(module).values() if is_dataclass(kind) and kind.__name__.endswith("Arguments")]
    values = flag_values(*parse(groups, shlex.split(GIVEN[command]), ""))
    assert values == TOOLS[command]


_ENCODER = {
    "encoder": "m", "pooling_method": None, "normalize_embeddings": True, "fp16": False, "dtype": None, "moe": None,
    "engine": "packed", "truncate_dim": None, "batch_size": 256, "workers": None, "cache_dir": None,
    "trust_remote_code": False,
}  # fmt: skip
_COLLECTION = {"languages": ["ko"], "split": "dev", "data_dir": None, "index_save_dir": "./corpus-index"}
_DEV = {
    "eval_data_dir": None, "eval_languages": [], "eval_split": "dev", "eval_query_length": 512,
    "eval_passage_length": 512, "query_instruction_for_retrieval": None, "passage_instruction_for_retrieval": None,
}  # fmt: skip
_EXPORT = {"model": "m", "output_dir": "o", "pooling_method": None, "overwrite": False, "cache_dir": None}
_MEASURES = ["ndcg@5", "ndcg@10", "recall@20"]
EVALUATION: dict[tuple[type[Any], ...], tuple[str, dict[str, object]]] = {
    (EncoderArguments, CollectionArguments, IndexArguments): ("--encoder m --languages ko", {
        **_ENCODER, **_COLLECTION, "max_passage_length": 512, "with_title": False, "allow_empty": False,
        "passage_instruction_for_retrieval": None, "shard_size": 2048, "overwrite": False,
    }),
    (VectorArguments,): ("i --to parquet --output_dir o", {
        "index": "i", "to": "parquet", "output_dir": "o", "url": None, "name": "passages", "payload": [],
        "data_dir": None, "batch_rows": None, "overwrite": False, "cache_dir": None,
    }),
    (RayArguments,): ("", {
        "address": None, "min_actors": 1, "max_actors": 8, "gpus_per_actor": 0.0, "cpus_per_actor": 1.0,
    }),
    (ShareArguments,): ("", {"shards": None, "help_others": True, "finish": False, "merge_from": []}),
    (EncoderArguments, CollectionArguments, SearchArguments): ("--encoder m --languages ko", {
        **_ENCODER, **_COLLECTION, "result_save_dir": "./search_results", "max_query_length": 512,
        "add_instruction": None, "query_instruction_for_retrieval": None, "threads": 1, "hits": 1000,
        "index_type": "Flat", "rescore": None, "n_probe": 32, "ef_search": 128, "overwrite": True,
    }),
    (ScoreArguments,): ("--encoder m --languages ko", {
        "encoder": ["m"], "languages": ["ko"], "split": "dev", "search_result_save_dir": "./search_results",
        "qrels_dir": "../qrels", "data_dir": None, "index_save_dir": None, "eval_result_save_dir": "./eval_results",
        "modes": ["dense"],
        "metrics": ["ndcg@10"], "pooling_method": None, "normalize_embeddings": None, "moe": None, "compare": False,
        "compare_save_dir": None, "resamples": 10_000, "seed": 0, "cache_dir": None,
    }),
    (StoreArguments,): ("", {"modes": ["dense"], "colbert_type": None}),
    (ModeArguments,): ("", {
        "modes": ["dense"], "fusion_weights": [1.0, 0.3, 1.0], "rrf_k": 60, "rerank": 200, "rerank_from": ["dense"],
        "tune_queries": 500,
    }),
    (CompareArguments,): ("a b --qrels q", {
        "runs": ["a", "b"], "qrels": "q", "topics": None, "names": [], "language": "all", "metrics": _MEASURES,
        "output_dir": "./comparison", "resamples": 10_000, "seed": 0,
    }),
    (MergeArguments, DevArguments): ("a b --output_dir o", {
        "models": ["a", "b"], "output_dir": "o", "weights": [], "method": "linear", "sweep": [], "overwrite": False,
        "cache_dir": None, **_DEV,
    }),
    (SourceArguments, FoldArguments, SampleArguments, DevArguments): ("m --output_dir o", {
        **_EXPORT, "method": "load", "data": [], "samples": 500, **_DEV,
    }),
    (SourceArguments, OnnxArguments, SampleArguments, DevArguments): ("m --output_dir o", {
        **_EXPORT, "heads": [], "int8": False, "data": [], "samples": 500, **_DEV,
    }),
    (ReproduceArguments, TrainOverrides): ("--base_model m --languages ko --train_dir d", {
        "base_model": "m", "languages": ["ko"], "train_dir": ["d"], "data_dir": None, "qrels_dir": None, "split": "dev",
        "output_dir": "./reproduced", "seeds": [42], "rows": [], "table": None, "metrics": _MEASURES,
        "pooling_method": "cls", "query_instruction_for_retrieval": None, "passage_instruction_for_retrieval": None,
        "fp16": True, "max_query_length": 512, "max_passage_length": 8192, "batch_size": 4, "hits": 100, "threads": 4,
        "with_title": False, "train_args": "", "train_launcher": None, "keep_indexes": False, "dry_run": False,
        "resamples": 10_000, "learning_rate": None, "max_steps": None, "num_train_epochs": None,
        "per_device_train_batch_size": None, "gradient_accumulation_steps": None, "train_group_size": None,
        "temperature": None, "query_max_len": None, "passage_max_len": None, "warmup_ratio": None,
    }),
}  # fmt: skip


@pytest.mark.parametrize("groups", EVALUATION, ids=lambda groups: "-".join(group.__name__ for group in groups))
def test_the_flags_and_defaults_of_the_evaluation(groups: tuple[type[Any], ...]) -> None:
    words, expected = EVALUATION[groups]
    assert flag_values(*parse(groups, words.split(), "")) == expected
