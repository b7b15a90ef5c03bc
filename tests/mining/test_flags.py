"""The flags of the mining commands: as published, and answered at once."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from FlagEmbedding.mining.doctor import arguments as doctor
from FlagEmbedding.mining.hard_negatives import arguments as mining
from FlagEmbedding.mining.query_generation import arguments as queries
from FlagEmbedding.utils.cli import parse_whole

ENCODER = {
    "pooling_method": None, "normalize_embeddings": True, "fp16": False, "dtype": None, "moe": None,
    "engine": "packed", "batch_size": 256, "workers": 0, "cache_dir": None, "trust_remote_code": False,
    "query_max_length": 512, "passage_max_length": None, "query_instruction_for_retrieval": None,
    "passage_instruction_for_retrieval": None, "with_title": None, "index_dir": None,
    "index_save_dir": "./corpus-index", "search_batch_size": 2048, "threads": 1, "use_gpu_for_searching": False,
}  # fmt: skip
MINING = {
    "input_file": [], "data_dir": None, "language": "ko", "split": "train", "corpus": [], "report_dir": None,
    "overwrite": False, "range_for_sampling": "10-210", "negative_number": 15, "sampling_strategy": "random",
    "fill": "random", "random_negatives": False, "seed": 42, "absolute_margin": None, "relative_margin": None,
    "max_score": None, "min_score": None, "cross_encoder": None, "cross_encoder_max_length": 512,
    "cross_encoder_batch_size": 32, "with_scores": False, "encoder": "m", "output_file": "o",
}  # fmt: skip
QUERIES = {
    "input_file": ["i"], "reuse_from": [], "output_file": "o", "report_dir": None, "overwrite": False, "replace": False,
    "queries_per_negative": 1, "seed": 42, "base_url": None, "model": None, "api_key_env": "OPENAI_API_KEY",
    "request_options": "{}", "concurrency": 8, "timeout": 60.0, "max_retries": 8, "backoff": 1.0, "max_requests": None,
    "local_model": None, "generation_batch_size": 8, "local_dtype": "fp32", "prompt": None, "language": None,
    "temperature": 0.7, "max_tokens": 256, "cache": None, "dry_run": False, "attempts": 3, "min_length": 5,
    "max_length": 200, "corpus": [], "round_trip_top_k": 0, "encoder": "",
}  # fmt: skip
DOCTOR = {
    "paths": ["p"], "report_dir": None, "train_group_size": None, "sample_rows": 0, "seed": 42, "encoder": "",
    "tokenizer": None, "query_max_len": 128, "passage_max_len": 512, "temperature": 0.02, "pooling_method": None,
    "batch_size": 256, "query_instruction_for_retrieval": None, "passage_instruction_for_retrieval": None,
    "cache_dir": None, "trust_remote_code": False,
}  # fmt: skip


def flat(options: Any) -> dict[str, Any]:
    return {name: value for group in asdict(options).values() for name, value in group.items()}


def parse(words: str) -> dict[str, Any]:
    return flat(mining.parse_mining_options(shlex.split(f"--language ko --encoder m --output_file o {words}")))


def test_defaults_are_the_published_ones() -> None:
    found = parse("")
    assert {name: found[name] for name in {**MINING, **ENCODER}} == {**MINING, **ENCODER}
    found = flat(parse_whole(queries.QueryOptions, ["--input_file", "i", "--output_file", "o"], ""))
    assert {name: found[name] for name in {**QUERIES, **ENCODER}} == {**QUERIES, **ENCODER}
    found = flat(parse_whole(doctor.DoctorOptions, ["p"], ""))
    assert {name: found[name] for name in DOCTOR} == DOCTOR


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--model_name_or_path x", "encoder", "x"),
        ("--embedder_name_or_path x", "encoder", "x"),
        ("--use_fp16", "fp16", True),
        ("--fp16 y", "fp16", True),
        ("--normalize_embeddings False", "normalize_embeddings", False),
        ("--embedder_query_max_length 7", "query_max_length", 7),
        ("--embedder_passage_max_length 7", "passage_max_length", 7),
        ("--max_passage_length 7", "passage_max_length", 7),
        ("--candidate_pool a b", "corpus", ["a", "b"]),
        ("--with_title n", "with_title", False),
        ("--use_gpu_for_searching", "use_gpu_for_searching", True),
    ],
)
def test_other_spellings(words: str, name: str, value: object) -> None:
    assert parse(words)[name] == value


def test_the_doctor_takes_model_and_paths_in_any_order() -> None:
    found = flat(parse_whole(doctor.DoctorOptions, ["--model", "m", "a", "b", "--seed", "3"], ""))
    assert (found["encoder"], found["paths"], found["seed"]) == ("m", ["a", "b"], 3)


@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag", "1"]])
@pytest.mark.parametrize(
    "command",
    ["hard_negatives", "query_generation", "doctor", "convert", "merge", "sample", "score", "split_data_by_length"],
)
def test_help_and_mistyped_flags_are_answered_without_the_heavy_libraries(command: str, words: list[str]) -> None:
    code = (
        "import sys, runpy, atexit\n"
        "heavy = ('torch', 'transformers', 'faiss', 'sentence_transformers', 'datasets')\n"
        "atexit.register(lambda: print('HEAVY', [m for m in heavy if m in sys.modules]))\n"
        f"sys.argv = ['x', *{words!r}]\n"
        f"runpy.run_module('FlagEmbedding.mining.{command}', run_name='__main__', alter_sys=True)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.stdout.endswith("HEAVY []\n"), answer.stdout + answer.stderr
    assert "--output" in answer.stdout or "--report_dir" in answer.stdout or "--help lists all options" in answer.stderr


# ---- every option acts: hard_negatives ----
