"""The check by itself: what it says of good files, its notes, its exit codes. Bad rows: tests/test_schema.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from FlagEmbedding.finetune.check_data import main


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"query": "who dug the canal?", "pos": ["Workers of Goryeo dug it."], "neg": ["a canal", "a lake", "a ford"]}
QUERIES = {"neg_q": ["what is dug?", "", ["what is deep?", "what is still?"]]}
SCORES = {"pos_scores": [3], "neg_scores": [2, 1, 0]}


def test_counts_of_good_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train/a.jsonl", [ROW, {**ROW, **QUERIES}])
    write(tmp_path / "train/b.json", [{**ROW, **SCORES, "neg": ROW["neg"][:1], "neg_scores": [1]}, {**ROW, **SCORES}])
    alone = write(tmp_path / "c.jsonl", [ROW])
    assert main([str(tmp_path / "train"), str(alone)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/train/a.jsonl: 2 rows, 6 negatives (at least 3 a row), neg_q for 2 of them",
        f"{tmp_path}/train/b.json: 2 rows, 4 negatives (at least 1 a row), teacher scores in 2 rows",
        f"{alone}: 1 rows, 3 negatives (at least 3 a row)",
        "ok: 5 rows in 3 files",
    ]


def test_notes_say_what_training_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = write(tmp_path / "a.jsonl", [{**ROW, **SCORES}])
    bare = write(tmp_path / "b.jsonl", [ROW])
    assert main([str(tmp_path), "--knowledge_distillation", "--train_group_size", "5"]) == 0
    fill = "  note: rows with fewer than 4 negatives repeat them to fill a group of 5"
    assert capsys.readouterr().out.splitlines() == [
        f"{scored}: 1 rows, 3 negatives (at least 3 a row), teacher scores in 1 rows",
        fill,
        f"{bare}: 1 rows, 3 negatives (at least 3 a row)",
        fill,
        "  note: no teacher scores: its batches train without distillation",
        "ok: 2 rows in 2 files",
    ]
    assert main([str(tmp_path), "--knowledge_distillation", "False", "--train_group_size", "4"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_distillation_needs_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write(tmp_path / "b.jsonl", [ROW])
    assert main([str(bare), "--knowledge_distillation", "True"]) == 2
    assert capsys.readouterr().err == (
        f"error: {bare}: no row has pos_scores and neg_scores; add them, or leave --knowledge_distillation out\n"
    )
    partly = write(tmp_path / "p.jsonl", [{**ROW, **SCORES}, {**ROW, "pos_scores": [1]}, {**ROW, **SCORES}])
    assert main([str(partly), "--knowledge_distillation", "True"]) == 2
    assert capsys.readouterr().err == (
        f"error: {partly}:2: pos_scores, neg_scores are missing; 2 of 3 rows here have both: give them to all rows, or "
        "to none\n"
    )
    assert main([str(partly)]) == 0


def test_every_missing_score_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "p.jsonl", [{**ROW, **SCORES}, *[ROW] * 64])
    assert main([str(tmp_path), "--knowledge_distillation"]) == 2
    assert capsys.readouterr().err.startswith("error: 64 problems in the data, the first 20:\n")


def test_group_size_below_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", [ROW])
    assert main([str(tmp_path), "--train_group_size", "0"]) == 2
    assert capsys.readouterr().err == "error: --train_group_size must be at least 1, got 0\n"
