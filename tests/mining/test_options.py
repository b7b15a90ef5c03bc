"""Every option of the mining commands acts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mining.chat_server import ChatServer, failing
from mining.corpora import TEXTS, write_collections, write_rows
from options_walk import Case, assert_acts, assert_complete, flag_fields

from FlagEmbedding.mining.common.options import MiningEncoder, ReportedOutput, SearchArguments
from FlagEmbedding.mining.doctor import arguments as doctor
from FlagEmbedding.mining.doctor.command import main as doctor_main
from FlagEmbedding.mining.hard_negatives import arguments as mining
from FlagEmbedding.mining.hard_negatives.command import main as mining_main
from FlagEmbedding.mining.hard_negatives.filters import Sampling, ScoreFilters
from FlagEmbedding.mining.query_generation import arguments as queries
from FlagEmbedding.mining.query_generation.command import main as queries_main

WHERE = "where the work is done, not what comes out"
HUB = "only for checkpoints that come with code"
HALF = "on a processor without bfloat16 this is float32"
MINING_CASES = {
    "input_file": Case("--input_file rows.jsonl"),
    "data_dir": Case("--data_dir other"),
    "language": Case("--language fa"),
    "split": Case("--split dev"),
    "corpus": Case("--corpus corpus.jsonl"),
    "report_dir": Case("--report_dir elsewhere", only=("files",)),
    "with_scores": Case("--with_scores"),
    "encoder": Case("--encoder moe", only=("rows", "files")),
    "pooling_method": Case("--pooling_method mean", only=("rows",)),
    "normalize_embeddings": Case("--normalize_embeddings n", given="--with_scores", only=("rows",)),
    "moe": Case("--moe output", only=("code",)),
    "engine": Case("--engine padded"),
    "batch_size": Case("--batch_size 1", given="--engine padded", only=("forwards",)),
    "truncate_dim": Case("--truncate_dim 4", only=("rows",)),
    "query_max_length": Case("--query_max_length 4", only=("rows",)),
    "passage_max_length": Case("--passage_max_length 4", only=("rows",)),
    "query_instruction_for_retrieval": Case(
        "--query_instruction_for_retrieval 'find the river: '", given="--with_scores", only=("rows",)
    ),
    "passage_instruction_for_retrieval": Case(
        "--passage_instruction_for_retrieval 'read this text: '", given="--with_scores", only=("rows",)
    ),
    "with_title": Case("--with_title", only=("rows",)),
    "index_dir": Case("--index_dir another", only=("files",)),
    "index_save_dir": Case("--index_save_dir another", only=("files",)),
    "search_batch_size": Case("--search_batch_size 3", only=("identity",)),
    "threads": Case("--threads 3", only=("threads",)),
    "range_for_sampling": Case("--range_for_sampling 5-30", only=("rows",)),
    "negative_number": Case("--negative_number 4", only=("rows",)),
    "sampling_strategy": Case("--sampling_strategy top", only=("rows",)),
    "fill": Case("--fill none", given="--relative_margin 0.02", only=("rows",)),
    "random_negatives": Case("--random_negatives", only=("rows",)),
    "seed": Case("--seed 7", only=("rows",)),
    "absolute_margin": Case("--absolute_margin 0.01", only=("rows",)),
    "relative_margin": Case("--relative_margin 0.01", only=("rows",)),
    "max_score": Case("--max_score 0.99", only=("rows",)),
    "min_score": Case("--min_score 0.99", only=("rows",)),
    "cross_encoder": Case("--cross_encoder reranker", given="--with_scores", only=("rows",)),
    "cross_encoder_max_length": Case(
        "--cross_encoder_max_length 60", given="--with_scores --cross_encoder reranker", only=("rows",)
    ),
    "cross_encoder_batch_size": Case(
        "--cross_encoder_batch_size 3", given="--with_scores --cross_encoder reranker", only=("identity",)
    ),
}
MINING_EXEMPT = {
    "modes": "tests/mining/test_mode_candidates.py",
    "output_file": "every run writes its own", "overwrite": "test_other_arguments_do_not_go_on_with_a_journal",
    "fp16": HALF, "dtype": HALF, "workers": WHERE, "use_gpu_for_searching": "accepted as published",
    "cache_dir": "test_hub_cache", "trust_remote_code": HUB,
}  # fmt: skip


def test_no_field_of_hard_negatives_is_left_out() -> None:
    groups = (
        mining.InputArguments, mining.MinedOutput, MiningEncoder, SearchArguments, Sampling, ScoreFilters,
        mining.RerankerArguments, mining.CandidateArguments,
    )  # fmt: skip
    assert_complete(groups, MINING_CASES, MINING_EXEMPT)


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_moe_dir: Path, cross_encoder_dir: Path
) -> Path:
    """Collections in two languages, two splits and two folders, rows, a corpus, models."""
    folder = tmp_path_factory.mktemp("walk")
    write_collections(folder)
    write_rows(folder / "rows.jsonl", [{"query": f"How old is {i}?", "pos": [TEXTS[i]]} for i in range(40)])
    write_rows(folder / "corpus.jsonl", [{"docid": f"d{i}", "text": f"{text} Indeed."} for i, text in enumerate(TEXTS)])
    shutil.copytree(tiny_model_dir, folder / "model")
    shutil.copytree(tiny_moe_dir, folder / "moe")
    shutil.copytree(cross_encoder_dir, folder / "reranker")
    return folder


@pytest.fixture(scope="module")
def observed() -> dict[tuple[str, ...], dict[str, Any]]:
    return {}


def observe_mining(place: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    """Run the command in a fresh folder; what it wrote."""
    run = folder / f"run{len(list(folder.iterdir()))}"
    run.mkdir()
    given = ["--encoder", "model"]
    given += [] if "--input_file" in words else ["--language", "ko", "--data_dir", "data"]
    given += ["--range_for_sampling", "2-20", "--negative_number", "6"]
    if "--random_negatives" in words:
        given = given[2:]
    names = {path.name: str(path) for path in place.iterdir()}
    resolved = [names.get(word, word) for word in (*given, *words)]
    resolved = [str(run / word) if word in ("elsewhere", "another") else word for word in resolved]
    if "--index_save_dir" not in words:
        resolved = ["--index_save_dir", str(run / "index"), *resolved]
    code = mining_main([*resolved, "--output_file", str(run / "o.jsonl")])
    output, reports = run / "o.jsonl", sorted(run.rglob("o.json"))
    record = json.loads(reports[0].read_text()) if reports else {"result": None, "identity": None, "arguments": None}
    return {
        "code": code,
        "rows": output.read_text() if output.exists() else None,
        "result": record["result"],
        "identity": [record["identity"], record["arguments"] and record["arguments"]["search"]["search_batch_size"],
                     record["arguments"] and record["arguments"]["reranker"]["cross_encoder_batch_size"]],
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*")),
    }  # fmt: skip


@pytest.mark.parametrize("name", MINING_CASES)
def test_every_option_of_hard_negatives_acts(
    name: str, place: Path, observed: dict, tmp_path: Path, threads: set[int], forwards: list[str]
) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        if tuple(words) not in observed:
            threads.clear()
            forwards.clear()
            found = observe_mining(place, tmp_path, words)
            observed[tuple(words)] = found | {"threads": set(threads), "forwards": len(forwards)}
        return observed[tuple(words)]

    assert_acts(MINING_CASES[name], observe)


# ---- query_generation ----

CHECKED = "--model m --base_url SERVER --prompt 'Ask: <p>{passage}</p>' --backoff 0.01"
TRIP = f"{CHECKED} --encoder model --round_trip_top_k 3 --attempts 1"
QUERY_CASES = {
    "input_file": Case("--input_file rows2.jsonl"),
    "reuse_from": Case("--reuse_from more.jsonl", only=("rows",)),
    "report_dir": Case("--report_dir elsewhere", only=("files",)),
    "replace": Case("--replace", only=("rows",)),
    "queries_per_negative": Case("--queries_per_negative 2", only=("rows",)),
    "seed": Case("--seed 3", given="--reuse_from several.jsonl", only=("rows",)),
    "model": Case("--model other", given=CHECKED, only=("bodies",)),
    "base_url": Case("--base_url SERVER/nowhere", given=CHECKED, only=("code",)),
    "api_key_env": Case("--api_key_env NOT_THERE", given=CHECKED, only=("code",)),
    "request_options": Case("""--request_options '{"top_p": 0.5}'""", given=CHECKED, only=("bodies",)),
    "concurrency": Case("--concurrency 1", given=f"{CHECKED} --max_requests 20", only=("together",)),
    "timeout": Case("--timeout 0.05", given=f"{CHECKED} --max_retries 0 --attempts 1", only=("rows",)),
    "max_retries": Case("--max_retries 0", given=f"{CHECKED} --attempts 1", only=("rows",)),
    "max_requests": Case("--max_requests 3", given=CHECKED, only=("rows", "bodies")),
    "prompt": Case("--prompt 'Tell: <p>{passage}</p>'", given=CHECKED, only=("bodies",)),
    "temperature": Case("--temperature 0", given=CHECKED, only=("bodies",)),
    "max_tokens": Case("--max_tokens 9", given=CHECKED, only=("bodies",)),
    "cache": Case("--cache elsewhere", given=CHECKED, only=("files",)),
    "dry_run": Case("--dry_run", given=CHECKED, only=("rows", "bodies")),
    "attempts": Case("--attempts 1", given=f"{CHECKED} --min_length 30", only=("bodies",)),
    "min_length": Case("--min_length 60", given=CHECKED, only=("rows",)),
    "max_length": Case("--max_length 12", given=CHECKED, only=("rows",)),
    "round_trip_top_k": Case("--round_trip_top_k 60", given=TRIP, only=("rows",)),
    "corpus": Case("--corpus corpus.jsonl", given=TRIP, only=("report",)),
    "encoder": Case("--encoder moe", given=TRIP, only=("report",)),
    "query_instruction_for_retrieval": Case(
        "--query_instruction_for_retrieval 'find the river: '", given=TRIP, only=("rows",)
    ),
}
TESTED = "test_a_local_model_writes_the_same_queries_again"
SAME = "the same group and the same code as in hard_negatives"
QUERY_EXEMPT = {
    "output_file": "every run writes its own", "overwrite": "test_query_generation", "local_model": TESTED,
    "generation_batch_size": WHERE, "local_dtype": HALF, "language": "test_prompts_of_ones_own",
    "backoff": "how long is waited: test_llm", "cache_dir": "test_hub_cache", "trust_remote_code": HUB,
    **{name: SAME for name in flag_fields([MiningEncoder, SearchArguments])
       if name not in ("encoder", "query_instruction_for_retrieval", "cache_dir", "trust_remote_code")},
}  # fmt: skip


def test_no_field_of_query_generation_is_left_out() -> None:
    groups = (
        queries.ReuseArguments, ReportedOutput, queries.EndpointArguments, queries.LocalModelArguments,
        queries.WritingArguments, queries.CheckArguments, queries.RoundTripArguments, MiningEncoder, SearchArguments,
    )  # fmt: skip
    assert_complete(groups, QUERY_CASES, QUERY_EXEMPT)


def query_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "query": f"q{i}" + "x" * i,
            "pos": [TEXTS[i], "Shared by several."],
            "neg": [TEXTS[(i + 1) % 8], TEXTS[30 + i]],
        }
        for i in range(8)
    ]
    rows.append({"query": "other", "pos": ["x"], "neg": ["Shared by several."]})
    rows.append({"query": "kept", "pos": ["y"], "neg": [TEXTS[2]], "neg_q": ["mine"]})
    return rows


def observe_queries(place: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    run = folder / f"run{len(list(folder.iterdir()))}"
    run.mkdir()
    write_rows(run / "rows1.jsonl", query_rows())
    write_rows(run / "rows2.jsonl", query_rows()[2:])
    write_rows(run / "more.jsonl", [{"query": "known", "pos": [TEXTS[30]], "neg": ["-"]}])
    several = [{"query": f"real {i}", "pos": TEXTS[30:38], "neg": ["-"]} for i in range(9)]
    write_rows(run / "several.jsonl", several)
    names = {path.name: str(path) for path in [*place.iterdir(), *run.iterdir()]}
    with ChatServer(failing(0.4), delay=0.06) as server:
        given = ["--input_file", "rows1.jsonl", *words]
        resolved = [names.get(word, word.replace("SERVER", server.base_url)) for word in given]
        resolved = [str(run / word) if word == "elsewhere" else word for word in resolved]
        if "--encoder" in words:
            resolved += ["--index_dir", str(run / "index")]
        code = queries_main([*resolved, "--output_file", str(run / "o.jsonl")])
    output, reports = run / "o.jsonl", sorted(run.rglob("o.neg_q.json"))
    record = json.loads(reports[0].read_text()) if reports else {}
    return {
        "code": code,
        "rows": output.read_text() if output.exists() else None,
        "bodies": sorted(json.dumps(request["body"]) for request in server.requests),
        "report": [record.get("rejected"), {**(record.get("model") or {}), "where": ""}, record.get("negatives")],
        "together": server.most_under_way,
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*")),
    }


@pytest.mark.parametrize("name", QUERY_CASES)
def test_every_option_of_query_generation_acts(name: str, place: Path, tmp_path: Path) -> None:
    assert_acts(QUERY_CASES[name], lambda words: observe_queries(place, tmp_path, words))


# ---- doctor ----

DOCTOR_CASES = {
    "paths": Case("two.jsonl"),
    "report_dir": Case("--report_dir elsewhere", only=("files",)),
    "train_group_size": Case("--train_group_size 9", only=("findings",)),
    "sample_rows": Case("--sample_rows 3", only=("lengths",)),
    "seed": Case("--seed 1", given="--sample_rows 5", only=("lengths",)),
    "query_max_len": Case("--query_max_len 3", given="--model model", only=("lengths", "scores")),
    "passage_max_len": Case("--passage_max_len 4", given="--model model", only=("lengths", "scores")),
    "temperature": Case("--temperature 0.5", given="--model model", only=("scores",)),
    "query_instruction_for_retrieval": Case(
        "--query_instruction_for_retrieval 'a b: '", given="--model model", only=("scores",)
    ),
    "passage_instruction_for_retrieval": Case(
        "--passage_instruction_for_retrieval 'a b: '", given="--model model", only=("scores",)
    ),
    "encoder": Case("--model model", only=("scores", "lengths")),
    "tokenizer": Case("--tokenizer model", only=("lengths",)),
    "pooling_method": Case("--pooling_method mean", given="--model model", only=("scores",)),
    "moe": Case("--moe output", given="--model model", only=("code",)),
    "truncate_dim": Case("--truncate_dim 4", given="--model model", only=("scores",)),
    "batch_size": Case("--batch_size 1", given="--model model --engine padded", only=("forwards",)),
}
DOCTOR_EXEMPT = {
    "fp16": HALF, "dtype": HALF, "workers": WHERE, "engine": "the same vectors by another path",
    "cache_dir": "test_hub_cache", "trust_remote_code": HUB,
}  # fmt: skip


def test_no_field_of_the_doctor_is_left_out() -> None:
    assert_complete((doctor.ReadingArguments, doctor.ScoreSettings, doctor.DoctorEncoder), DOCTOR_CASES, DOCTOR_EXEMPT)


@pytest.mark.parametrize("name", DOCTOR_CASES)
def test_every_option_of_the_doctor_acts(name: str, place: Path, tmp_path: Path, forwards: list[str]) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        forwards.clear()
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        rows = [{**row, "neg": [f"{i} {text}" for i in range(n + 1) for text in row["neg"]], "neg_q": None}
                for n, row in enumerate(query_rows())]  # fmt: skip
        write_rows(run / "one.jsonl", rows)
        write_rows(run / "two.jsonl", rows[:4])
        paths = {"model": str(place / "model")} | {name: str(run / name) for name in ("elsewhere", "two.jsonl")}
        code = doctor_main([str(run / "one.jsonl"), *(paths.get(word, word) for word in words)])
        reports = sorted(run.rglob("report.json"))
        record = json.loads(reports[0].read_text()) if reports else {}
        files = sorted(str(p.relative_to(run)) for p in run.rglob("*"))
        parts = ("findings", "lengths", "scores", "files")
        found = {part: str(record.get(part)).replace(str(run), "") for part in parts}
        return {"code": code, "read": found.pop("files"), **found, "files": files, "forwards": len(forwards)}

    assert_acts(DOCTOR_CASES[name], observe)
