"""A twin of a positive, by characters nobody sees or by what the encoder reads of it, is never its negative."""

from __future__ import annotations

import json
from pathlib import Path
from unicodedata import normalize

import pytest

from FlagEmbedding.mining.doctor import command as doctor
from FlagEmbedding.mining.hard_negatives.command import main

POSITIVE = "پرآب\u200cترین رود ایران کارون است"
UNSEEN = {
    "a space for the joiner": POSITIVE.replace("\u200c", " "),
    "without the joiner": POSITIVE.replace("\u200c", ""),
    "no-break spaces": POSITIVE.replace(" ", "\u00a0"),
    "double spaces": POSITIVE.replace(" ", "  "),
    "zero width spaces": POSITIVE.replace(" ", " \u200b"),
    "decomposed": normalize("NFD", POSITIVE),
    "a mark in front": f"\ufeff\u200f{POSITIVE}",
}
OTHERS = [f"رود {name} در کوه {i}" for i, name in enumerate(("دجله", "فرات", "اروند", "هیرمند"))]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mine(
    folder: Path, model: Path, passages: list[str], positive: str, *words: str
) -> tuple[list[str], dict[str, int]]:
    """The negatives of one query out of ``passages``, and how many were left out for which reason."""
    corpus = write(folder / "corpus.jsonl", [{"docid": f"d{i}", "text": text} for i, text in enumerate(passages)])
    rows = write(folder / "rows.jsonl", [{"query": "کارون کجاست", "pos": [positive]}])
    given = ["--input_file", rows, "--corpus", corpus, "--encoder", model, "--index_save_dir", folder / "index"]
    given += ["--output_file", folder / "out.jsonl", "--range_for_sampling", "0-50", "--negative_number", "50", *words]
    assert main([str(word) for word in given]) == 0
    report = json.loads((folder / "reports/out.json").read_text())["result"]
    return json.loads((folder / "out.jsonl").read_text())["neg"], report["left_out"]


@pytest.mark.parametrize("words", [("--fill", "none"), ("--random_negatives",)])
def test_what_nobody_sees_makes_no_negative(tiny_model_dir: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    passages = [POSITIVE, *UNSEEN.values(), *OTHERS]
    negatives, left_out = mine(tmp_path, tiny_model_dir, passages, POSITIVE, *words)
    assert sorted(negatives) == sorted(OTHERS)
    assert sum(left_out.values()) == 1 + len(UNSEEN)


TWIN, POSITIVE_TOO = (POSITIVE + more * 3 for more in (" و از زاگرس سرچشمه می‌گیرد ", " و به خلیج فارس می‌ریزد "))


@pytest.mark.parametrize(("length", "expected"), [(12, OTHERS), (126, [TWIN, *OTHERS])])
def test_what_the_encoder_reads_alike_makes_no_negative(
    tiny_model_dir: Path, tmp_path: Path, length: int, expected: list[str]
) -> None:
    """Passages that differ behind the cut have one vector; where more is read they are two passages."""
    words = ("--fill", "none", "--passage_max_length", str(length))
    negatives, left_out = mine(tmp_path, tiny_model_dir, [TWIN, POSITIVE_TOO, *OTHERS], POSITIVE_TOO, *words)
    assert sorted(negatives) == sorted(expected)
    assert left_out.get("same_as_positive", 0) == 5 - len(expected)


@pytest.mark.parametrize("fill", ["random", "next"])
def test_what_fills_up_is_no_twin_either(tiny_model_dir: Path, tmp_path: Path, fill: str) -> None:
    """The query's own text is the first rank and the whole window; all that is left is the positive and its twin."""
    for length, expected in ((12, []), (126, [TWIN])):
        folder = tmp_path / str(length)
        folder.mkdir()
        corpus = write(folder / "corpus.jsonl", [
            {"docid": f"d{i}", "text": text} for i, text in enumerate((TWIN, POSITIVE_TOO, "ab"))
        ])  # fmt: skip
        rows = write(folder / "rows.jsonl", [{"query": "ab", "pos": [POSITIVE_TOO]}])
        words = ["--input_file", rows, "--corpus", corpus, "--encoder", tiny_model_dir, "--index_dir", folder / "index"]
        words += ["--output_file", folder / "out.jsonl", "--range_for_sampling", "0-1", "--negative_number", "1"]
        words += ["--fill", fill, "--passage_max_length", length]
        assert main([str(word) for word in words]) == 0
        assert [json.loads(line)["neg"] for line in (folder / "out.jsonl").open()] == ([expected] if expected else [])


def test_the_doctor_lists_twins(tmp_path: Path) -> None:
    negatives = [*UNSEEN.values(), *OTHERS]
    rows = write(tmp_path / "rows.jsonl", [{"query": "q", "pos": [POSITIVE], "neg": negatives}])
    assert doctor.main([str(rows), "--report_dir", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report/report.json").read_text())["findings"]["false_negative"]
    assert found["count"] == len(UNSEEN)
    assert found["places"][0].startswith(f"{rows}:1: neg[0]")


def test_the_doctor_lists_what_the_tokenizer_makes_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    row = {"query": "q", "pos": [f"{POSITIVE} one"], "neg": [OTHERS[0], f"{POSITIVE} two", UNSEEN["decomposed"]]}
    rows = write(tmp_path / "rows.jsonl", [row])
    for length, expected in ((12, [f"{rows}:1: neg[1]"]), (100, [])):
        words = [rows, "--tokenizer", tiny_model_dir, "--passage_max_len", length, "--report_dir", tmp_path / "report"]
        assert doctor.main([str(word) for word in words]) == 0
        found = json.loads((tmp_path / "report/report.json").read_text())["findings"]["same_tokens"]
        assert [place[: len(f"{rows}:1: neg[0]")] for place in found["places"]] == expected
