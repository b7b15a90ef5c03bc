"""What decides the negatives is part of the job's identity, what refuses refuses early, the figures by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mining.corpora import TEXTS, brute_force, read_rows, write_rows
from safetensors.torch import load_file, save_file

from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.mining.__main__ import main as page_main
from FlagEmbedding.mining.common.jobs import Job, journal_path
from FlagEmbedding.mining.hard_negatives.command import main
from FlagEmbedding.mining.hard_negatives.filters import ScoreFilters

ROWS = [{"query": f"How old is number {i}?", "pos": [TEXTS[i], TEXTS[i + 9]], "neg": [TEXTS[40 + i]]} for i in range(6)]


class Mine:
    """Runs the command on rows and a corpus of files, with one index for all runs of a module."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.source = write_rows(folder / "rows.jsonl", ROWS)
        self.corpus = write_rows(folder / "corpus.jsonl", [{"docid": f"d{i}", "text": t} for i, t in enumerate(TEXTS)])

    def __call__(self, output: Path, *words: str) -> int:
        given = ["--input_file", str(self.source), "--corpus", str(self.corpus), "--encoder", str(self.model)]
        given += ["--index_save_dir", str(self.folder / "index"), "--range_for_sampling", "0-20"]
        return main([*given, "--negative_number", "6", "--output_file", str(output), *words])


@pytest.fixture(scope="module")
def mine(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Mine:
    return Mine(tmp_path_factory.mktemp("mine"), tiny_model_dir)


def test_whatever_decides_the_negatives_is_in_the_jobs_identity(
    mine: Mine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.jsonl"
    journal = journal_path(output)
    journal.write_text('{"journal": 1, "output": "o.jsonl"}\n')
    words = "--absolute_margin 0.001 --relative_margin 0.002 --max_score 0.99 --min_score 0.1 --with_scores"
    words += " --query_instruction_for_retrieval x"
    assert mine(output, *words.split()) == 2
    error = capsys.readouterr().err
    assert "was left by another command" in error and "--overwrite True" in error
    for key in (
        "range_for_sampling", "negative_number", "sampling_strategy", "fill", "random_negatives", "seed",
        "absolute_margin", "relative_margin", "max_score", "min_score", "corpus", "encoder model", "encoder pooling",
        "encoder normalize_embeddings", "index", "query_max_length", "passage_max_length", "query_instruction",
        "batch_size", "inputs", "search_batch_size", "with_scores", "with_title",
    ):  # fmt: skip
        assert f"{key}: null there" in error, key
    assert journal.exists() and not output.exists()


def test_another_reranker_does_not_go_on_with_a_journal(
    mine: Mine, cross_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another name, or other weights under the same name: what was scored until then is of another kind."""
    reranker, output = tmp_path / "reranker", tmp_path / "o.jsonl"
    shutil.copytree(cross_encoder_dir, reranker)
    words = ["--cross_encoder", str(reranker), "--with_scores"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "finish", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine(output, *words)
    kept = journal_path(output).read_bytes()
    assert mine(output, "--cross_encoder", str(cross_encoder_dir), "--with_scores") == 2
    assert "cross_encoder: " in capsys.readouterr().err
    weights = load_file(reranker / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, reranker / "model.safetensors")
    assert mine(output, *words) == 2
    assert "cross_encoder: " in capsys.readouterr().err
    assert journal_path(output).read_bytes() == kept


def test_a_chunk_is_embedded_as_a_whole_again(mine: Mine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector's last bits depend on what is computed beside it: a resumed run computes the same chunks."""
    embedded: list[list[str]] = []
    embed, add = Retriever.embed_queries, Job.add

    def watched(self: Retriever, texts: list[str]) -> np.ndarray:
        embedded.append(list(texts))
        return embed(self, texts)

    def ending(self: Job, *entry: Any) -> None:
        if self.done == 2:
            raise ZeroDivisionError
        add(self, *entry)

    monkeypatch.setattr(Retriever, "embed_queries", watched)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    words = ["--search_batch_size", "4", "--with_scores"]
    assert mine(whole, *words) == 0
    expected = [[str(row["query"]) for row in ROWS[i : i + 4]] for i in (0, 4)]
    assert embedded == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "add", ending)
        with pytest.raises(ZeroDivisionError):
            mine(broken, *words)
    embedded.clear()
    assert mine(broken, *words) == 0
    assert embedded == expected
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("fill", ["random", "next"])
def test_every_score_is_the_rerankers(mine: Mine, cross_encoder_dir: Path, tmp_path: Path, fill: str) -> None:
    """Also those of positives, and of negatives that were filled up."""
    words = ["--cross_encoder", str(cross_encoder_dir), "--with_scores", "--range_for_sampling", "0-6", "--fill", fill]
    words += ["--max_score", "0.025"]  # leaves out a third of the window
    assert mine(tmp_path / "o.jsonl", *words) == 0
    from sentence_transformers import CrossEncoder

    reranker = CrossEncoder(str(cross_encoder_dir), device="cpu", max_length=512)
    for row in read_rows(tmp_path / "o.jsonl"):
        texts = row["pos"] + row["neg"]
        expected = reranker.predict([(row["query"], text) for text in texts], activation_fn=torch.nn.Sigmoid())
        np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], expected, atol=2e-6)
    assert json.loads((tmp_path / "reports/o.json").read_text())["result"]["filled"] > 0


def test_an_output_that_is_there_is_refused_before_any_work(
    mine: Mine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.jsonl"
    output.write_text("mine\n")
    assert mine(output, "--encoder", "/nowhere") == 2
    assert "o.jsonl is there already: pass --overwrite True" in capsys.readouterr().err
    assert mine(tmp_path, "--encoder", "/nowhere") == 2
    assert "is a folder: name the file to write" in capsys.readouterr().err
    assert output.read_text() == "mine\n"


def test_several_processes_are_refused(
    mine: Mine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mine(tmp_path / "o.jsonl") == 2
    assert "mining runs in one process" in capsys.readouterr().err


def test_positives_outside_the_index_are_embedded_as_passages(mine: Mine, tmp_path: Path) -> None:
    """With instructions, and cut at the passages' length: as the index would have embedded them."""
    rows = [{"query": "Which?", "pos": ["Not in the corpus.", TEXTS[3]]}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--query_instruction_for_retrieval", "find: ", "--passage_instruction_for_retrieval", "read: "]
    words += ["--index_dir", str(tmp_path / "index"), "--input_file", str(source), "--with_scores"]
    assert mine(tmp_path / "o.jsonl", *words) == 0
    (row,) = read_rows(tmp_path / "o.jsonl")
    query = brute_force(mine.model, ["find: Which?"])[0]
    passages = brute_force(mine.model, [f"read: {text}" for text in row["pos"] + row["neg"]])
    np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], passages @ query, atol=5e-6)


def test_relevant_passages_that_the_filters_would_let_through(mine: Mine, tmp_path: Path) -> None:
    """Two positives each: what a margin would do to them, counted by brute force."""
    assert mine(tmp_path / "o.jsonl", "--absolute_margin", "0.00001", "--range_for_sampling", "0-60") == 0
    queries, passages = brute_force(mine.model, [str(row["query"]) for row in ROWS]), brute_force(mine.model, TEXTS)
    expected = {"judged": 0, "judged_pass": 0, "hidden": 0, "hidden_pass": 0}
    for i, query in enumerate(queries):
        scores = passages @ query
        window = np.argsort(-scores)[:60]
        pair = [i, i + 9]
        limit = scores[pair].min() - 0.00001
        # Row 60 is row 0 in another spelling.
        judged = [row for row in window if row in pair or (row == 60 and 0 in pair)]
        expected["judged"] += len(judged)
        expected["judged_pass"] += sum(scores[row] <= limit for row in judged)
        inside = [row for row in pair if scores[window].min() <= scores[row] <= scores[window].max()]
        expected["hidden"] += len(inside)
        expected["hidden_pass"] += sum(scores[row] <= scores[sum(pair) - row] - 0.00001 for row in inside)
    found: dict[str, Any] = json.loads((tmp_path / "reports/o.json").read_text())["result"]
    assert found["false_negatives"] == expected
    assert expected["hidden"] > expected["hidden_pass"] > 0


def test_a_reranker_of_two_labels_is_refused(
    mine: Mine, tiny_bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2)
    model.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path / "two")
    words = ["--cross_encoder", str(tmp_path / "two"), "--max_score", "0.9"]
    assert mine(tmp_path / "o.jsonl", *words) == 2
    assert "a classifier of 2 labels; expected one" in capsys.readouterr().err


def test_limits_are_exclusive_and_margins_count_from_the_positive() -> None:
    filters = ScoreFilters(absolute_margin=0.25)
    assert filters.reason(0.5, 0.75) is None and filters.reason(0.5001, 0.75) == "absolute_margin"
    filters = ScoreFilters(relative_margin=0.5)
    assert filters.reason(0.5, 1.0) is None and filters.reason(0.5001, 1.0) == "relative_margin"
    # Of a negative score, a share of its size: −1 less a half of 1.
    assert filters.reason(-1.5, -1.0) is None and filters.reason(-1.4, -1.0) == "relative_margin"
    filters = ScoreFilters(max_score=0.5, min_score=0.25)
    assert [filters.reason(score, 1.0) for score in (0.2, 0.25, 0.5, 0.6)] == ["min_score", None, None, "max_score"]
    assert ScoreFilters(max_score=0.0).given() == ["max_score"]  # 0 is a limit


def test_the_page_runs_the_command_of_another_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        page_main(["check_data", str(write_rows(tmp_path / "rows.jsonl", [{**ROWS[0], "neg": ["n"]}]))])
    assert ended.value.code == 0
