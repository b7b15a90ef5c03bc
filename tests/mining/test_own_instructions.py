"""Mining puts before the texts what the checkpoint was trained with, unless it is told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mining.corpora import QUERIES, TEXTS, brute_force, read_rows, write_rows

from FlagEmbedding.mining.doctor.command import main as doctor_main
from FlagEmbedding.mining.hard_negatives.command import main


@pytest.fixture(scope="module")
def told(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says ``Q: `` of queries and ``P: `` of passages."""
    folder = tmp_path_factory.mktemp("told") / "told"
    shutil.copytree(tiny_model_dir, folder)
    prompts = {"query": "Q: ", "passage": "P: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


@pytest.mark.parametrize(
    ("words", "query", "passage"),
    [
        ((), "Q: ", "P: "),
        (("--query_instruction_for_retrieval", "find: "), "find: ", "P: "),
        (("--query_instruction_for_retrieval", "", "--passage_instruction_for_retrieval", "read: "), "", "read: "),
    ],
)
def test_scores_are_of_texts_behind_their_instructions(
    words: tuple[str, ...], query: str, passage: str, told: Path, tmp_path: Path
) -> None:
    texts = TEXTS[:30]
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"docid": f"d{i}", "text": text} for i, text in enumerate(texts)])
    source = write_rows(tmp_path / "rows.jsonl", [{"query": QUERIES["q0"], "pos": ["Not in the corpus.", texts[3]]}])
    given = ["--input_file", str(source), "--corpus", str(corpus), "--encoder", str(told), "--with_scores"]
    given += ["--index_save_dir", str(tmp_path / "index"), "--range_for_sampling", "0-20", "--negative_number", "6"]
    for run in ("built", "there"):  # the index of the first run serves the second
        assert main([*given, *words, "--output_file", str(tmp_path / f"{run}.jsonl")]) == 0
        (row,) = read_rows(tmp_path / f"{run}.jsonl")
        vector = brute_force(told, [query + row["query"]])[0]
        vectors = brute_force(told, [passage + text for text in row["pos"] + row["neg"]])
        np.testing.assert_allclose(row["pos_scores"] + row["neg_scores"], vectors @ vector, atol=5e-6)


def test_the_doctor_reads_what_training_reads(told: Path, tmp_path: Path) -> None:
    row = {"query": QUERIES["q0"], "pos": [TEXTS[3]], "neg": [TEXTS[8]], "neg_q": ["Which one?"]}
    source = write_rows(tmp_path / "rows.jsonl", [row])
    assert doctor_main([str(source), "--model", str(told), "--report_dir", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report/report.json").read_text())
    query, own, positive, negative = brute_force(
        told, [f"Q: {row['query']}", "Q: Which one?", f"P: {TEXTS[3]}", f"P: {TEXTS[8]}"]
    )
    expected = {"positive": positive @ query, "negative": negative @ query, "penalty": 1 - negative @ own}
    for name, value in expected.items():
        assert found["scores"][name]["mean"] == pytest.approx(value, abs=5e-6)
    assert found["settings"]["query_instruction_for_retrieval"] == "Q: "
