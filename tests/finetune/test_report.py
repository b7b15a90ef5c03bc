"""The report of a run: what it shows, that texts cannot act in it, and a machine without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import dev_lines, losses, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.files import write_collection, written_files
from FlagEmbedding.collections.trec import read_qrels, read_topics

MOE: dict[str, Any] = {
    "moe": "intermediate", "num_experts": 2, "num_experts_per_tok": 1, "max_steps": 4, "learning_rate": 5e-3,
    "eval_steps": 2,
}  # fmt: skip
HOSTILE = "<script>alert(1)</script> | ![x](http://evil/x.png) `code` When do people visit?"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(24))
    return folder


def test_it_shows_the_run_and_texts_cannot_act(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    plain = written_files(write_dev(tmp_path / "plain", "ko", 72), "ko")
    passages = [(p.docid, p.title, f"{HOSTILE} {p.text}") for p in read_file(plain.corpus[0])]
    topics = {qid: f"{HOSTILE} {query}" for qid, query in read_topics(plain.topics).items()}
    write_collection(tmp_path / "dev", "ko", passages, topics, read_qrels(plain.qrels))
    words = train_words(tiny_model_dir, data, tmp_path / "out", **MOE, eval_data_dir=tmp_path / "dev")
    run_training([*words, "--eval_languages", "ko"])
    page = (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG") and "](report.png)" in page
    base, *_, last = dev_lines(tmp_path / "out")
    shown = [f"{100 * line['eval_ndcg@10']:.1f}" for line in (base, last)]
    assert all(value in page for value in shown) and "0 (base)" in page
    assert f"{losses(tmp_path / 'out')[-1]['loss']:.4g}" in page
    assert "Queries that gained most" in page and "Queries that lost most" in page
    assert "| layer |" in page.replace("  ", " ") or "expert 0" in page
    assert "alert(1)" in page and "<script" not in page
    assert "![x]" not in page.replace("\\](", "](") or "\\](" in page


def test_a_plain_run_has_one_too_and_it_can_be_left_out(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", max_steps=2)
    run_training(words)
    page = (tmp_path / "out/report.md").read_text()
    assert "Losses" in page and "Dev queries" not in page and (tmp_path / "out/report.png").is_file()
    run_training(train_words(tiny_model_dir, data, tmp_path / "none", max_steps=2, report=False))
    assert not list((tmp_path / "none").glob("report*"))


def test_without_matplotlib_there_is_no_picture(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", max_steps=2))
    assert "the report has no picture: charts need matplotlib" in answer.stderr
    page = (tmp_path / "out/report.md").read_text()
    assert "report.png" not in page and not (tmp_path / "out/report.png").exists()
