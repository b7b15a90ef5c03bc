"""Every option of the evaluation's commands acts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import pytest
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding.evaluation import arguments
from FlagEmbedding.evaluation.__main__ import embed, score, search
from FlagEmbedding.evaluation.compare import main as compare
from FlagEmbedding.indexing.arguments import IndexArguments, ShareArguments
from FlagEmbedding.inference.arguments import EncoderArguments
from tests.evaluation.conftest import QUERIES, make_passages, write_collection

WHERE = "where the work is done, not what comes out"
HUB = "only for checkpoints that come with code"
HALF = "on a processor without bfloat16 this is float32"
ENCODER_EXEMPT = {
    "fp16": HALF, "workers": WHERE, "cache_dir": "test_hub_cache", "trust_remote_code": HUB,
}  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_moe_dir: Path) -> Path:
    """Two models, three collections (one with an empty passage), indexes and runs of both models."""
    folder = tmp_path_factory.mktemp("walk")
    shutil.copytree(tiny_model_dir, folder / "dense")
    shutil.copytree(tiny_moe_dir, folder / "moe")
    for root, seed in (("data", 0), ("other", 5)):
        for lang in ("ko", "fa"):
            write_collection(folder / root, lang, make_passages(40, seed + (lang == "fa")), QUERIES)
            topics = folder / root / f"miracl-v1.0-{lang}/topics"
            lines = (topics / f"topics.miracl-v1.0-{lang}-dev.tsv").read_text().splitlines(keepends=True)
            (topics / f"topics.miracl-v1.0-{lang}-testA.tsv").write_text("".join(lines[:3]))
    (folder / "other/miracl-v1.0-ko/topics/topics.miracl-v1.0-ko-dev.tsv").write_text("5-0\tsea and river\n")
    empty = [{**row, "text": "" if i == 3 else row["text"]} for i, row in enumerate(make_passages(8))]
    write_collection(folder / "empty", "ko", empty, QUERIES)
    given = ["--languages", "ko", "fa", "--data_dir", str(folder / "data"), "--index_save_dir", str(folder / "index")]
    more = ["--languages", "ko", "--data_dir", str(folder / "other"), "--index_save_dir", str(folder / "index2")]
    for name in ("dense", "moe"):
        assert embed(["--encoder", str(folder / name), *given]) == 0
        assert search(["--encoder", str(folder / name), *given, "--result_save_dir", str(folder / "runs")]) == 0
    assert embed(["--encoder", str(folder / "dense"), *more]) == 0
    assert search(["--encoder", str(folder / "dense"), *given, "--result_save_dir", str(folder / "runs2"),
                   "--hits", "7"]) == 0  # fmt: skip
    for root, grades in (("qrels", (1, 0)), ("qrels2", (0, 1)), ("qrels3", (1, 1))):
        for lang, split in (("ko", "dev"), ("fa", "dev"), ("ko", "testA")):
            run = (folder / f"runs/moe/{lang}.txt").read_text().splitlines()
            lines, count = [], 3 if split == "testA" else 9
            for number, qid in enumerate(list(QUERIES)[:count]):
                docids = [line.split()[2] for line in run if line.split()[0] == qid]
                chosen = zip(docids[number % 3 :][:2], grades, strict=True)
                lines += [f"{qid}\tQ0\t{docid}\t{grade}\n" for docid, grade in chosen]
            path = folder / root / f"qrels.miracl-v1.0-{lang}-{split}.tsv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(lines))
    for name in ("dense", "moe"):
        shutil.copy(folder / f"runs/{name}/ko.txt", folder / f"{name}.run")
    shutil.copy(folder / "runs2/dense/ko.txt", folder / "short.run")
    (folder / "topics.tsv").write_text("".join(f"{qid}\tabout {text}\n" for qid, text in QUERIES.items()))
    return folder


def resolve(place: Path, run: Path, words: list[str]) -> list[str]:
    """Names of what lies in ``place`` as its paths; ``new…`` is a folder of this run."""
    names = {path.name: str(path) for path in place.iterdir()}
    return [str(run / word) if word.startswith("new") else names.get(word, word) for word in words]


def fresh(folder: Path) -> Path:
    run = folder / f"run{len(list(folder.iterdir()))}"
    run.mkdir()
    return run


# ---- step 0 ----

EMBED_CASES = {
    "encoder": Case("--encoder moe", only=("names", "index")),
    "pooling_method": Case("--pooling_method mean", only=("index", "identity")),
    "normalize_embeddings": Case("--normalize_embeddings n", only=("index", "identity")),
    "truncate_dim": Case("--truncate_dim 8", only=("index", "identity")),
    "dtype": Case("--dtype bf16", only=("index", "identity")),
    "moe": Case("--moe output", only=("code",)),
    "engine": Case("--engine padded", only=("identity",)),
    "languages": Case("--languages fa ko", only=("names", "index")),
    "data_dir": Case("--data_dir other", only=("index",)),
    "index_save_dir": Case("--index_save_dir new2", only=("names",)),
    "max_passage_length": Case("--max_passage_length 5", only=("index", "identity")),
    "with_title": Case("--with_title", only=("index", "identity")),
    "passage_instruction_for_retrieval": Case("--passage_instruction_for_retrieval 'a: '", only=("index", "identity")),
    "allow_empty": Case("--allow_empty", given="--data_dir empty", only=("code", "index")),
    "shard_size": Case("--shard_size 7", only=("identity",)),
    "batch_size": Case("--batch_size 1", given="--engine padded", only=("identity", "forwards")),
    "shards": Case("--shards 1/2", only=("names",)),
    "help_others": Case("--help_others n", given="--shards 1/2 --shard_size 7", only=("names",)),
    "finish": Case("--finish", given="--index_save_dir index", only=("forwards",)),
    "merge_from": Case("--merge_from nothing", given="--finish --index_save_dir index", only=("code",)),
}
EMBED_EXEMPT = {
    **ENCODER_EXEMPT, "split": "the corpus has no splits",
    "overwrite": "test_what_is_there_is_kept_unless_told_otherwise",
}  # fmt: skip


def test_no_field_of_step_0_is_left_out() -> None:
    groups = (EncoderArguments, arguments.CollectionArguments, IndexArguments, ShareArguments)
    assert_complete(groups, EMBED_CASES, EMBED_EXEMPT)


@pytest.mark.parametrize("name", EMBED_CASES)
def test_every_option_of_step_0_acts(name: str, place: Path, tmp_path: Path, forwards: list[str]) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        run = fresh(tmp_path)
        forwards.clear()
        given = ["--encoder", "dense", "--languages", "ko", "--data_dir", "data", "--index_save_dir", "new"]
        code = embed(resolve(place, run, [*given, *words]))
        files = written(run)
        return {
            "code": code,
            "names": sorted(files),
            "index": [content for path, content in files.items() if path.endswith(("index", "docid"))],
            "identity": [json.loads(files[path])["identity"] for path in files if path.endswith("manifest.json")],
            "forwards": len(forwards),
        }

    assert_acts(EMBED_CASES[name], observe)


# ---- step 1 ----

SEARCH_CASES = {
    "encoder": Case("--encoder moe", only=("names", "runs")),
    "pooling_method": Case("--pooling_method mean", only=("code",)),
    "normalize_embeddings": Case("--normalize_embeddings n", only=("code",)),
    "moe": Case("--moe output", only=("code",)),
    "dtype": Case("--dtype bf16", only=("runs",)),
    "truncate_dim": Case("--truncate_dim 8", only=("code",)),  # the index has whole vectors
    "languages": Case("--languages ko fa", only=("names", "runs")),
    "split": Case("--split testA", only=("runs",)),
    "data_dir": Case("--data_dir other", only=("runs",)),
    "index_save_dir": Case("--index_save_dir index2", only=("runs",)),
    "result_save_dir": Case("--result_save_dir new2", only=("names",)),
    "max_query_length": Case("--max_query_length 4", only=("runs",)),
    "add_instruction": Case("--add_instruction y", only=("runs",)),
    "query_instruction_for_retrieval": Case("--query_instruction_for_retrieval 'find: '", only=("runs",)),
    "hits": Case("--hits 3", only=("runs",)),
    "index_type": Case("--index_type IVF8,Flat", given="--n_probe 1", only=("runs",)),
    "n_probe": Case("--n_probe 1", given="--index_type IVF8,Flat", only=("runs",)),
    "ef_search": Case("--ef_search 1", given="--index_type HNSW2 --hits 1", only=("runs",)),
    "rescore": Case("--rescore 0", given="--index_type binary --hits 3", only=("runs",)),
    "overwrite": Case("--overwrite n", given="--result_save_dir kept", only=("runs",)),
    "batch_size": Case("--batch_size 1", given="--engine padded", only=("forwards",)),
    "threads": Case("--threads 3", only=("threads",)),
    "threads of faiss": Case("--threads 3", given="--index_type SQ8", only=("threads of faiss",)),
}
SEARCH_EXEMPT = {**ENCODER_EXEMPT, "engine": "the same vectors by another path"}


def test_no_field_of_step_1_is_left_out() -> None:
    groups = (EncoderArguments, arguments.CollectionArguments, arguments.SearchArguments)
    assert_complete(groups, {name for name in SEARCH_CASES if " " not in name}, SEARCH_EXEMPT)


@pytest.mark.parametrize("name", SEARCH_CASES)
def test_every_option_of_step_1_acts(
    name: str, place: Path, tmp_path: Path, threads: set[int], forwards: list[str]
) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        run = fresh(tmp_path)
        threads.clear()
        forwards.clear()
        words = ["newkept" if word == "kept" else word for word in words]
        if "newkept" in words:
            (run / "newkept/dense").mkdir(parents=True)
            (run / "newkept/dense/ko.txt").write_text("an older run\n")
        given = ["--encoder", "dense", "--languages", "ko", "--data_dir", "data", "--index_save_dir", "index"]
        code = search(resolve(place, run, [*given, "--result_save_dir", "new", "--hits", "20", *words]))
        files = written(run)
        runs = {Path(path).name: content for path, content in files.items() if path.endswith(".txt")}
        used: dict[str, Any] = {"threads": set(threads), "threads of faiss": faiss.omp_get_max_threads()}
        used["forwards"] = len(forwards)
        return {"code": code, "names": sorted(files), "runs": runs, **used}

    assert_acts(SEARCH_CASES[name], observe)


# ---- step 2 ----

COMPARED = "--encoder dense moe --compare"
SCORE_CASES = {
    "encoder": Case("--encoder moe", only=("names", "results")),
    "languages": Case("--languages ko fa", only=("results",)),
    "split": Case("--split testA", given="--search_result_save_dir bare", only=("results",)),
    "search_result_save_dir": Case("--search_result_save_dir runs2", only=("origin",)),
    "qrels_dir": Case("--qrels_dir qrels2", only=("results",)),
    "data_dir": Case("--data_dir other", given=COMPARED, only=("page",)),
    "index_save_dir": Case("--index_save_dir index2", given="--search_result_save_dir bare", only=("origin",)),
    "eval_result_save_dir": Case("--eval_result_save_dir new2", only=("names",)),
    "metrics": Case("--metrics recall@5", only=("results",)),
    "pooling_method": Case("--pooling_method mean", only=("code",)),
    "normalize_embeddings": Case("--normalize_embeddings n", only=("code",)),
    "compare": Case("--compare", given="--encoder dense moe", only=("names", "tests")),
    "compare_save_dir": Case("--compare_save_dir new2", given=COMPARED, only=("names",)),
    "resamples": Case("--resamples 150", given=COMPARED, only=("tests",)),
    "seed": Case("--seed 3", given=COMPARED, only=("tests",)),
}
SCORE_EXEMPT = {
    "modes": "tests/evaluation/test_modes.py",
    "moe": "accepted from older scripts, does nothing",
    "cache_dir": "test_hub_cache",
}


def test_no_field_of_step_2_is_left_out() -> None:
    assert_complete((arguments.ScoreArguments,), SCORE_CASES, SCORE_EXEMPT)


@pytest.mark.parametrize("name", SCORE_CASES)
def test_every_option_of_step_2_acts(name: str, place: Path, tmp_path: Path) -> None:
    if not (place / "bare").exists():  # a run without the record of step 1
        (place / "bare/dense").mkdir(parents=True)
        shutil.copy(place / "runs/dense/ko.txt", place / "bare/dense/ko.txt")

    def observe(words: list[str]) -> dict[str, Any]:
        run = fresh(tmp_path)
        given = ["--encoder", "dense", "--languages", "ko", "--search_result_save_dir", "runs", "--qrels_dir", "qrels"]
        given += ["--eval_result_save_dir", "new", "--resamples", "200"]
        code = score(resolve(place, run, [*given, *words]))
        files = written(run)
        results = [json.loads(files[path]) for path in files if path.endswith(".json") and "comparison" not in path]
        compared = [json.loads(files[path]) for path in files if path.endswith("comparison.json")]
        return {
            "code": code,
            "names": sorted(files),
            "results": [found["results"] for found in results],
            "origin": [found["runs"] for found in results],
            "tests": [found["comparisons"] for found in compared],
            "page": [content for path, content in files.items() if path.endswith("comparison.md")],
        }

    assert_acts(SCORE_CASES[name], observe)


# ---- compare ----

COMPARE_CASES = {
    "runs": Case("short.run", only=("results", "tests")),
    "qrels": Case("--qrels qrels2/qrels.miracl-v1.0-ko-dev.tsv", only=("results", "tests")),
    "topics": Case("--topics topics.tsv", only=("page", "queries")),
    "names": Case("--names one two", only=("results", "page")),
    "language": Case("--language Korean", only=("results", "tests", "page")),
    "metrics": Case("--metrics map", only=("results", "tests")),
    "output_dir": Case("--output_dir new2", only=("names",)),
    "resamples": Case("--resamples 150", only=("tests",)),
    "seed": Case("--seed 3", only=("tests",)),
}


def test_no_field_of_compare_is_left_out() -> None:
    assert_complete((arguments.CompareArguments,), COMPARE_CASES, {})


@pytest.mark.parametrize("name", COMPARE_CASES)
def test_every_option_of_compare_acts(name: str, place: Path, tmp_path: Path) -> None:
    def observe(words: list[str]) -> dict[str, Any]:
        run = fresh(tmp_path)
        given = ["dense.run", "moe.run", "--resamples", "200", "--output_dir", "new"]
        given += ["--qrels", "qrels/qrels.miracl-v1.0-ko-dev.tsv"]
        runs = [word for word in words if word.endswith(".run")]
        words = [word for word in words if word not in runs]
        places = {f"{root}/qrels.miracl-v1.0-ko-dev.tsv": str(place / root / "qrels.miracl-v1.0-ko-dev.tsv")
                  for root in ("qrels", "qrels2")}  # fmt: skip
        resolved = resolve(place, run, [*runs, *given, *words])
        code = compare([places.get(word, word) for word in resolved])
        files = written(run)
        (found,) = (json.loads(content) for path, content in files.items() if path.endswith("comparison.json"))
        return {
            "code": code,
            "names": sorted(files),
            "results": found["results"],
            "tests": found["comparisons"],
            "page": [content for path, content in files.items() if path.endswith("comparison.md")],
            "queries": [content for path, content in files.items() if path.endswith("per_query.tsv")],
        }

    assert_acts(COMPARE_CASES[name], observe)
