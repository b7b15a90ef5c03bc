"""Teacher scores for rows as they are: the library's numbers, all else untouched, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mining.corpora import write_rows
from sentence_transformers import CrossEncoder

from FlagEmbedding.mining import score
from FlagEmbedding.mining.common.jobs import journal_path
from FlagEmbedding.mining.common.reranker import Reranker

ROWS = [
    {"query": "Which river runs through Seoul?", "pos": ["The Han river."], "neg": ["Kimchi is cabbage.", "Snow."]},
    {
        "query": "What leans?",
        "pos": ["The tower.", "It is a tower that leans."],
        "neg": ["A lake."],
        "neg_q": ["?"],
        "id": 7,
    },
    {
        "query": "How many arches?",
        "pos": "Thirty three.",
        "neg": ["Rain falls."],
        "pos_scores": [9.0],
        "neg_scores": [8.0],
    },
]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(folder: Path, model: Path, *more: str) -> list[str]:
    return [
        "--input_file",
        f"{folder}/rows.jsonl",
        "--reranker",
        f"{model}",
        "--output_file",
        f"{folder}/o.jsonl",
        *more,
    ]


def test_scores_are_the_rerankers(
    cross_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    assert score.main(words(tmp_path, cross_encoder_dir)) == 0
    assert "3 rows with pos_scores and neg_scores" in capsys.readouterr().out
    found, model = read(tmp_path / "o.jsonl"), CrossEncoder(str(cross_encoder_dir), device="cpu", max_length=512)
    for row, given in zip(found, ROWS, strict=True):
        pos = [given["pos"]] if isinstance(given["pos"], str) else given["pos"]
        pairs = [(given["query"], text) for text in [*pos, *given["neg"]]]
        expected = model.predict(pairs, activation_fn=torch.nn.Sigmoid()).tolist()
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(expected, abs=2e-6)
        assert len(row["pos_scores"]) == len(pos)
        assert {k: v for k, v in row.items() if "scores" not in k} == {
            k: v for k, v in given.items() if "scores" not in k
        }
    assert score.main(words(tmp_path, cross_encoder_dir)) == 2
    assert "is there already" in capsys.readouterr().err

    calls = 0
    whole = Reranker.score

    def breaks(self: Reranker, query: str, passages: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return whole(self, query, passages)

    before = (tmp_path / "o.jsonl").read_bytes()
    (tmp_path / "o.jsonl").unlink()
    monkeypatch.setattr(Reranker, "score", breaks)
    assert score.main(words(tmp_path, cross_encoder_dir)) == 130
    assert journal_path(tmp_path / "o.jsonl").exists() and not (tmp_path / "o.jsonl").exists()
    assert score.main(words(tmp_path, cross_encoder_dir)) == 0
    assert calls == 4, "two of the three rows were safe"
    assert (tmp_path / "o.jsonl").read_bytes() == before


def test_refused_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"query": "q", "pos": []}])
    assert score.main(["--input_file", f"{tmp_path}/rows.jsonl", "--output_file", f"{tmp_path}/o.jsonl"]) == 2
    assert "--reranker is missing" in capsys.readouterr().err
    assert score.main(words(tmp_path, tmp_path / "nowhere")) == 2
    assert "rows.jsonl:1" in capsys.readouterr().err
    assert score.main(["--input_file", "nowhere", "--reranker", "r", "--output_file", f"{tmp_path}/o.jsonl"]) == 2
    assert not list(tmp_path.glob("*o.jsonl*"))
