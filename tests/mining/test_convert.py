"""Convert, merge, sample: rows by hand out of MIRACL, BEIR and triples; kill -9; problems by line; flat memory."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.trec import read_topics
from FlagEmbedding.mining import convert, merge, sample


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(module, *words: object) -> int:
    return module.main([str(word) for word in words])


# ---- convert ----


@pytest.mark.parametrize("negatives", ["judged", "none"])
def test_miracl_by_hand(sample_dir: Path, tmp_path: Path, negatives: str) -> None:
    output = tmp_path / "fa.jsonl"
    words = ["--format", "miracl", "--data_dir", sample_dir, "--language", "fa", "--output_file", output]
    assert run(convert, *words, "--negatives", negatives) == 0
    texts = {p.docid: p.text for p in read_file(sample_dir / "miracl-corpus-v1.0-fa/docs-0.jsonl.gz")}
    folder = sample_dir / "miracl-v1.0-fa"
    grades = [line.split() for line in (folder / "qrels/qrels.miracl-v1.0-fa-train.tsv").open()]
    expected = []
    for qid, query in read_topics(folder / "topics/topics.miracl-v1.0-fa-train.tsv").items():
        row = {"query": query, "pos": [texts[d] for q, _, d, grade in grades if q == qid and grade == "1"]}
        others = [texts[d] for q, _, d, grade in grades if q == qid and grade == "0"]
        expected.append({**row, "neg": others} if others and negatives == "judged" else row)
    assert read(output) == expected and len(expected) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["fa.jsonl"]


def beir(folder: Path) -> Path:
    write(
        folder / "corpus.jsonl",
        [{"_id": f"d{i}", "title": f"T{i}" if i else "", "text": f"text {i}"} for i in range(5)],
    )
    write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"query {i} "} for i in range(4)])
    (folder / "qrels").mkdir()
    judged = [
        "query-id\tcorpus-id\tscore",
        "q0\td0\t1",
        "q0\td1\t2",
        "q0\td2\t0",
        "q1\td9\t1",
        "q3\td4\t1",
        "q3\td4\t1",
    ]
    (folder / "qrels/train.tsv").write_text("\n".join(judged) + "\n")
    return folder


def test_beir_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = beir(tmp_path / "beir")
    assert run(convert, "--format", "beir", "--input", folder, "--output_file", tmp_path / "out.jsonl") == 0
    expected = [
        {"query": "query 0", "pos": ["text 0", "T1 text 1"], "neg": ["T2 text 2"]},
        {"query": "query 3", "pos": ["T4 text 4"]},
    ]
    assert read(tmp_path / "out.jsonl") == expected  # query 1's passage is not in the corpus, query 2 has no judgment
    assert "2 rows\n  1 of them have no neg yet" in capsys.readouterr().out
    plain = ["--input", folder, "--output_file", tmp_path / "plain.jsonl", "--with_title", "n"]
    assert run(convert, "--format", "beir", *plain) == 0
    assert read(tmp_path / "plain.jsonl")[1]["pos"] == ["text 4"]
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    (folder / "corpus.jsonl").unlink()
    again = ["--input", folder, "--output_file", tmp_path / "out.jsonl", "--overwrite"]
    assert run(convert, "--format", "beir", *again) == 0
    assert read(tmp_path / "out.jsonl") == expected


def test_a_positive_in_another_spelling_is_no_negative(tmp_path: Path) -> None:
    folder = beir(tmp_path / "beir")
    with (folder / "corpus.jsonl").open("a") as stream:
        stream.write('{"_id": "e", "text": "TEXT  0"}\n')
    with (folder / "qrels/train.tsv").open("a") as stream:
        stream.write("q0\te\t0\n")
    assert run(convert, "--format", "beir", "--input", folder, "--output_file", tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl")[0] == {"query": "query 0", "pos": ["text 0", "T1 text 1"], "neg": ["T2 text 2"]}


def test_triples_in_every_form(tmp_path: Path) -> None:
    names = ("anchor", "positive", "negative")
    triplets = [dict(zip(names, texts, strict=True)) for texts in ("aPN", "aPM", "aNL", "bQN")]
    forms = {
        "triplet.jsonl": (triplets, [
            {"query": "a", "pos": ["P", "N"], "neg": ["M", "L"]}, {"query": "b", "pos": ["Q"], "neg": ["N"]}]),
        "arrays.jsonl": ([["a", "P", "N", "M"], ["b", "Q"]], [
            {"query": "a", "pos": ["P"], "neg": ["N", "M"]}, {"query": "b", "pos": ["Q"]}]),
        "tuples.jsonl": ([{"q": "a", "pos": "P", "negative_1": "N", "negative_2": "M", "score": [0.9, 0.5, 0.25]}], [
            {"query": "a", "pos": ["P"], "neg": ["N", "M"], "pos_scores": [0.9], "neg_scores": [0.5, 0.25]}]),
        "pairs.jsonl": ([{"anchor": "a", "passage": "P", "label": 1}, {"anchor": "a", "passage": "N", "label": 0}], [
            {"query": "a", "pos": ["P"], "neg": ["N"]}]),
        # A query whose lines have not all scores has none.
        "some.jsonl": ([{"q": "a", "p": "P", "n": "N", "score": [0.9, 0.5]}, {"q": "a", "p": "P", "n": "M"}], [
            {"query": "a", "pos": ["P"], "neg": ["N", "M"]}]),
        "lists.jsonl": ([{"query": "a", "pos": ["P", "O"], "neg": ["N", "M"]}], [
            {"query": "a", "pos": ["P", "O"], "neg": ["N", "M"]}]),
    }  # fmt: skip
    for name, (lines, expected) in forms.items():
        write(tmp_path / name, lines)
        words = [
            "--format",
            "triples",
            "--input",
            tmp_path / name,
            "--output_file",
            tmp_path / "out.jsonl",
            "--overwrite",
        ]
        assert run(convert, *words) == 0
        assert read(tmp_path / "out.jsonl") == expected, name
    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        lines = [separator.join(words) for words in (["anchor", "positive", "negative"], ["a", '"P, p"', "N"])]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        words = [
            "--format",
            "triples",
            "--input",
            tmp_path / name,
            "--output_file",
            tmp_path / "out.jsonl",
            "--overwrite",
        ]
        assert run(convert, *words) == 0
        assert read(tmp_path / "out.jsonl") == [{"query": "a", "pos": ["P, p"], "neg": ["N"]}]


def test_triples_of_sentence_transformers_own_miner(tmp_path: Path) -> None:
    """What mine_hard_negatives writes for its four forms ends as the same rows."""
    datasets = pytest.importorskip("datasets")
    triplet = datasets.Dataset.from_dict({"query": ["a", "a"], "answer": ["P", "P"], "negative": ["N", "M"]})
    tuples = datasets.Dataset.from_dict({"query": ["a"], "answer": ["P"], "negative_1": ["N"], "negative_2": ["M"]})
    for number, table in enumerate((triplet, tuples)):
        table.to_json(tmp_path / f"{number}.jsonl", force_ascii=False)
        table.to_csv(tmp_path / f"{number}.csv", index=False)
        for suffix in ("jsonl", "csv"):
            words = ["--input", tmp_path / f"{number}.{suffix}", "--output_file", tmp_path / f"out{number}{suffix}"]
            assert run(convert, "--format", "triples", *words) == 0
            assert read(words[-1]) == [{"query": "a", "pos": ["P"], "neg": ["N", "M"]}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '["a", "P"]\n["a"]\n', "a.jsonl:2: 1 columns of text; give query, positive and negatives"),
        ("a.jsonl", '["a", "P"]\n["a", "", "N"]\n', "a.jsonl:2: a text is missing"),
        ("a.jsonl", '["a", "P"]\n{"a": \n', "a.jsonl:2: broken JSON"),
        ("a.jsonl", '{"q": "a", "p": "P", "n": "N", "score": [1]}\n', "a.jsonl:1: 1 scores for 2 passages"),
        ("a.csv", "q,p\na,P\na\n", "a.csv:3: 1 columns under a header of 2"),
        ("a.parquet", "x", "expected .jsonl, .csv or .tsv"),
    ],
)
def test_broken_triples_are_named_by_line(tmp_path: Path, capsys, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    assert run(convert, "--format", "triples", "--input", tmp_path / name, "--output_file", tmp_path / "out.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_broken_judgments_are_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = beir(tmp_path / "beir")
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\tyes\n")
    assert run(convert, "--format", "beir", "--input", folder, "--output_file", tmp_path / "out.jsonl") == 2
    assert (
        "train.tsv:2: expected a whole number of -2 to 1000 as grade (column 3), found 'yes'" in capsys.readouterr().err
    )
    assert run(convert, "--format", "beir", "--input", tmp_path, "--output_file", tmp_path / "out.jsonl") == 2
    assert "expected a BEIR folder" in capsys.readouterr().err


# ---- merge and sample ----

ROWS = [
    {"query": "a", "pos": ["P", "O"], "neg": ["N"], "neg_q": ["n"], "id": 7},
    {"query": "b", "pos": ["P"], "neg": ["N", "M"]},
    {"query": "c", "pos": ["P"]},
]


def test_merge_leaves_repeated_rows_out_and_rows_as_they_are(tmp_path: Path, capsys) -> None:
    first = write(tmp_path / "1.jsonl", ROWS)
    second = write(tmp_path / "2.jsonl", [
        {"query": " A ", "pos": ["O", "P"], "neg": ["n"]},   # says what row 1 says
        {"query": "b", "pos": ["P"], "neg": ["N"]},          # another set of negatives
        {"query": "d", "pos": ["한강"], "neg": ["N"], "neg_q": [["x", "y"]]},
    ])  # fmt: skip
    assert run(merge, "--input_file", first, second, "--output_file", tmp_path / "out.jsonl") == 0
    assert read(tmp_path / "out.jsonl") == [*ROWS, *read(second)[1:]]
    assert "5 rows, 1 repeated ones left out" in capsys.readouterr().out
    words = ["--input_file", first, second, "--output_file", tmp_path / "out.jsonl", "--overwrite", "--keep_repeated"]
    assert run(merge, *words) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == first.read_bytes() + second.read_bytes()


def test_sample_is_the_seeds_in_order_and_without_repeats(tmp_path: Path, capsys) -> None:
    rows = [{"query": f"q{i}", "pos": ["P"], "neg": ["N"]} for i in range(200)]
    source = [write(tmp_path / "1.jsonl", rows[:120]), write(tmp_path / "2.jsonl", rows[120:])]
    drawn = {}
    for seed in (1, 1, 2):
        words = ["--input_file", *source, "--output_file", tmp_path / "out.jsonl", "--number", 50, "--seed", seed]
        assert run(sample, *words, "--overwrite") == 0
        found = [int(row["query"][1:]) for row in read(tmp_path / "out.jsonl")]
        assert found == sorted(set(found)) and len(found) == 50 and min(found) < 120 < max(found)
        assert drawn.setdefault(seed, found) == found
    assert drawn[1] != drawn[2]
    assert run(sample, "--input_file", *source, "--output_file", tmp_path / "all.jsonl", "--share", 1) == 0
    assert read(tmp_path / "all.jsonl") == rows
    assert run(sample, "--input_file", *source, "--output_file", tmp_path / "x.jsonl", "--number", 201) == 2
    assert "there are 200" in capsys.readouterr().err


def test_problems_are_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad.jsonl", [ROWS[0], {"query": "a", "pos": [], "neg": ["N"]}])
    for module, more in ((merge, []), (sample, ["--number", 1])):
        assert run(module, "--input_file", bad, "--output_file", tmp_path / "out.jsonl", *more) == 2
        assert f"{bad}:2: pos is an empty list" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


# ---- kill -9 ----


@pytest.mark.parametrize("command", ["convert", "merge", "sample"])
def test_kill_9_in_the_middle_and_the_identical_file(command: str, tmp_path: Path) -> None:
    number = 12_000
    lines = [
        {"query": f"질문 {i % 8_000}", "pos": [f"문단 {i % 8_000}"], "neg": [f"다른 문단 {i % 8_000}"]}
        for i in range(number)
    ]
    source = write(tmp_path / "in.jsonl", [list(row.values()) for row in lines] if command == "convert" else lines)
    flags = {
        "convert": ["--format", "triples", "--input", source],
        "merge": ["--input_file", source],
        "sample": ["--input_file", source, "--share", "0.7"],
    }[command]
    outputs = [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    words = [
        [sys.executable, "-m", f"FlagEmbedding.mining.{command}", *map(str, flags), "--output_file", str(o)]
        for o in outputs
    ]
    subprocess.run(words[0], check=True, capture_output=True)
    kills = 0
    for size in (20_000, 200_000):
        worker = subprocess.Popen(words[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while worker.poll() is None and sum(p.stat().st_size for p in tmp_path.glob(".killed.jsonl.*.tmp")) < size:
            time.sleep(0.0005)
        worker.send_signal(signal.SIGKILL)
        kills += worker.wait() == -signal.SIGKILL
        assert not outputs[1].exists()
    assert kills == 2
    subprocess.run(words[1], check=True, capture_output=True)
    assert outputs[1].read_bytes() == outputs[0].read_bytes()
    assert len(read(outputs[0])) == {"convert": number, "merge": 8_000, "sample": 8_400}[command]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "killed.jsonl", "whole.jsonl"]
