"""Step 1: the run file against a plain matrix product and sort, and what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from FlagEmbedding.evaluation.__main__ import generate_embedding, search_results
from FlagEmbedding.evaluation.arguments import BGE_INSTRUCTION, SearchOptions
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.utils.cli import parse_whole
from FlagEmbedding.utils.errors import DataError, UsageError
from tests.evaluation.conftest import QUERIES

PUBLISHED = (
    "--encoder CreaLabs/bge-m3-fa-CLPL-outputMoE --languages ko fa hi --index_save_dir ./corpus-index "
    "--result_save_dir ./search_results --threads 4 --hits 20 --pooling_method cls --normalize_embeddings True "
    "--add_instruction False --moe intermediate"
)


def options_of(words: list[str]) -> SearchOptions:
    return parse_whole(SearchOptions, words, "")


@pytest.fixture(scope="module")
def indexes(tiny_model_dir: Path, collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("indexes")
    argv = ["--encoder", str(tiny_model_dir), "--languages", "ko", "fa", "hi", "--data_dir", str(collection)]
    assert generate_embedding([*argv, "--index_save_dir", str(out)]) == 0
    return out


def step1(model: Path, collection: Path, indexes: Path, out: Path, *more: str, languages: str = "ko") -> Path:
    argv = ["--encoder", str(model), "--languages", *languages.split(), "--data_dir", str(collection)]
    argv += ["--index_save_dir", str(indexes), "--result_save_dir", str(out)]
    assert search_results([*argv, *more]) == 0
    return out / model.name


def read_run(path: Path) -> dict[str, list[tuple[str, int, float]]]:
    run: dict[str, list[tuple[str, int, float]]] = {}
    for line in path.read_text().splitlines():
        qid, q0, docid, place, score, tag = line.split(" ")
        assert (q0, tag) == ("Q0", "Faiss")
        assert len(score.split(".")[1]) == 6
        run.setdefault(qid, []).append((docid, int(place), float(score)))
    return run


@pytest.mark.parametrize("more", [(), ("--threads", "2", "--max_query_length", "64", "--batch_size", "2")])
def test_runs_of_several_languages(
    tiny_model_dir: Path,
    collection: Path,
    indexes: Path,
    tmp_path: Path,
    reference_vectors: Callable[..., np.ndarray],
    more: tuple[str, ...],
) -> None:
    folder = step1(
        tiny_model_dir, collection, indexes, tmp_path, "--hits", "7", "--add_instruction", "False", *more,
        languages="ko fa hi",
    )  # fmt: skip
    queries = reference_vectors(tiny_model_dir, list(QUERIES.values())).astype(np.float64)
    for lang in ("ko", "fa", "hi"):
        index = FlatIndex(indexes / tiny_model_dir.name / lang)
        scores = queries @ index.read_rows(range(index.rows)).astype(np.float64).T
        run = read_run(folder / f"{lang}.txt")
        assert list(run) == list(QUERIES)
        for row, hits in zip(scores, run.values(), strict=True):
            expected = sorted(zip(row, index.docids, strict=True), reverse=True)[:7]
            assert [place for _, place, _ in hits] == list(range(1, 8))
            assert [docid for docid, _, _ in hits] == [docid for _, docid in expected]
            np.testing.assert_allclose([score for _, _, score in hits], [score for score, _ in expected], atol=1e-5)


def test_runs_repeat_to_the_byte_and_tell_where_they_come_from(
    tiny_model_dir: Path, collection: Path, indexes: Path, tmp_path: Path
) -> None:
    runs = [
        step1(tiny_model_dir, collection, indexes, tmp_path / threads, "--threads", threads) / "ko.txt"
        for threads in ("1", "2")
    ]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    record = json.loads(runs[0].with_suffix(".json").read_text())
    assert record["index"]["rows"] == 50
    assert record["index"]["with_title"] is False
    assert record["index"]["model"] == record["encoder"]["model"]
    assert {"commit", "versions", "argv"} <= record["provenance"].keys()


def test_an_instruction_changes_the_queries(
    tiny_model_dir: Path, collection: Path, indexes: Path, tmp_path: Path, reference_vectors: Callable[..., np.ndarray]
) -> None:
    folder = step1(
        tiny_model_dir, collection, indexes, tmp_path, "--query_instruction_for_retrieval", "query: ", "--hits", "1"
    )
    index = FlatIndex(indexes / tiny_model_dir.name / "ko")
    queries = reference_vectors(tiny_model_dir, [f"query: {query}" for query in QUERIES.values()])
    best = (queries @ index.read_rows(range(50)).T).max(axis=1)
    found = [hits[0][2] for hits in read_run(folder / "ko.txt").values()]
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_flags_of_the_instruction() -> None:
    base = ["--encoder", "m", "--languages", "ko"]
    assert options_of(base).search.query_instruction is None
    assert options_of([*base, "--add_instruction", "False"]).search.query_instruction is None
    assert options_of([*base, "--add_instruction", "True"]).search.query_instruction == BGE_INSTRUCTION
    text = ["--query_instruction_for_retrieval", "query: "]
    assert options_of([*base, *text]).search.query_instruction == "query: "
    assert options_of([*base, *text, "--add_instruction", "True"]).search.query_instruction == "query: "
    with pytest.raises(UsageError, match="contradict"):
        options_of([*base, *text, "--add_instruction", "False"])


@pytest.mark.parametrize("index_type", ["HNSW8", "SQ8", "IVF4,Flat"])
def test_approximate_indexes_say_what_they_miss(
    tiny_model_dir: Path,
    collection: Path,
    indexes: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    index_type: str,
) -> None:
    with caplog.at_level("INFO", logger="FlagEmbedding"):
        folder = step1(
            tiny_model_dir, collection, indexes, tmp_path, "--index_type", index_type, "--hits", "5", languages="fa"
        )
    assert f"{index_type} finds " in caplog.text
    assert "% of the exact top 5 in " in caplog.text
    assert all(len(hits) == 5 for hits in read_run(folder / "fa.txt").values())


def test_a_run_may_be_kept(tiny_model_dir: Path, collection: Path, indexes: Path, tmp_path: Path) -> None:
    path = step1(tiny_model_dir, collection, indexes, tmp_path) / "ko.txt"
    before = path.stat().st_mtime_ns
    step1(tiny_model_dir, collection, indexes, tmp_path, "--overwrite", "False")
    assert path.stat().st_mtime_ns == before
    step1(tiny_model_dir, collection, indexes, tmp_path)
    assert path.stat().st_mtime_ns != before
    before = path.stat().st_mtime_ns
    step1(tiny_model_dir, collection, indexes, tmp_path, "--overwrite", "False", languages="ko fa")
    assert path.stat().st_mtime_ns == before and path.with_name("fa.txt").is_file()


def test_a_run_never_stands_beside_the_record_of_an_older_one(
    tiny_model_dir: Path, collection: Path, indexes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = step1(tiny_model_dir, collection, indexes, tmp_path, "--hits", "3") / "ko.txt"
    older = path.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("FlagEmbedding.evaluation.step1.write_json_atomic", full)
    with pytest.raises(DataError, match=r"disk full while writing .*ko.txt"):
        step1(tiny_model_dir, collection, indexes, tmp_path, "--hits", "4")
    assert path.read_text() != older and not path.with_suffix(".json").exists()


def test_an_index_of_another_encoder_is_refused(
    tiny_model_dir: Path, tiny_moe_dir: Path, collection: Path, indexes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="pooling: cls there, mean here"):
        step1(tiny_model_dir, collection, indexes, tmp_path, "--pooling_method", "mean")
    shutil.copytree(tiny_moe_dir, retrained := tmp_path / tiny_model_dir.name)
    with pytest.raises(UsageError, match=r"made by another encoder .model: "):
        step1(retrained, collection, indexes, tmp_path)
    # One index of several: nothing is searched before all of them are known to fit.
    shutil.copytree(indexes, tmp_path / "indexes")
    manifest = tmp_path / "indexes" / tiny_model_dir.name / "fa/manifest.json"
    manifest.write_text(manifest.read_text().replace('"pooling": "cls"', '"pooling": "mean"'))
    with pytest.raises(UsageError, match=r"fa was made by another encoder .pooling: mean there, cls here"):
        step1(tiny_model_dir, collection, tmp_path / "indexes", tmp_path / "runs", languages="ko fa")
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_said_before_any_work(
    tiny_model_dir: Path, collection: Path, indexes: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"run step0-generate_embedding.py"):
        step1(tiny_model_dir, collection, indexes, tmp_path, languages="ko sw")
    with pytest.raises(UsageError, match="not in MIRACL"):
        step1(tiny_model_dir, collection, indexes, tmp_path, languages="ko klingon")
    with pytest.raises(DataError, match=r"topics.miracl-v1.0-ko-train.tsv"):
        step1(tiny_model_dir, collection, indexes, tmp_path, "--split", "train")
    with pytest.raises(UsageError, match="--hits 0"):
        step1(tiny_model_dir, collection, indexes, tmp_path, "--hits", "0")
    assert not list(tmp_path.iterdir())


def test_the_published_command_parses() -> None:
    options = options_of(PUBLISHED.split())
    found = options.search
    assert options.collection.languages == ["ko", "fa", "hi"]
    assert (found.threads, found.hits, found.add_instruction) == (4, 20, False)
    defaults = options_of(["--encoder", "m", "--languages", "ko"]).search
    assert (defaults.threads, defaults.hits, defaults.result_save_dir) == (1, 1000, "./search_results")
