"""Corpora in any form, the passages of rows, texts that count as the same; what a query's stream depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mining.corpora import QUERIES, TEXTS, read_rows, write_collection, write_rows

from FlagEmbedding.mining.common.alignment import realign, written
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, passages_of_rows
from FlagEmbedding.mining.common.rows import row_key
from FlagEmbedding.mining.hard_negatives.command import main
from FlagEmbedding.schema import TrainRecord
from FlagEmbedding.utils.texts import normalize_text


@pytest.mark.parametrize("other", ["a B  c", " A b\tC\n", "Ａ b c"])
def test_case_width_and_white_space_do_not_tell_texts_apart(other: str) -> None:
    assert normalize_text(other) == normalize_text("a b c")
    assert normalize_text("a bc") != normalize_text("a b c")


def test_negatives_keep_all_their_queries_wherever_they_stand() -> None:
    record = TrainRecord("q", ["p"], ["one", "two", "ONE", "three"], neg_q=[["a"], [], ["b", "a"], ["c"]])
    queries = realign(record, ["two", "new", "One", "three"])
    assert queries == [[], [], ["a", "b"], ["c"]]
    assert written(queries) == ["", "", ["a", "b"], "c"]


@pytest.mark.parametrize(
    "changed", [{"query": "x"}, {"pos": ["x"]}, {"neg": ["x"]}, {"pos": ["n", "m"], "neg": ["p", "o"]}]
)
def test_rows_of_another_query_or_other_passages_are_others(changed: dict) -> None:
    row = {"query": "q", "pos": ["p", "o"], "neg": ["n", "m"]}
    assert row_key(TrainRecord(**row)) == row_key(TrainRecord("q", ["o", "p"], ["M", "N"]))
    assert row_key(TrainRecord(**row)) == row_key(TrainRecord(**{**row, "query": "Q "}))
    assert row_key(TrainRecord(**row)) != row_key(TrainRecord(**{**row, **changed}))


def test_a_folder_is_read_by_the_numbers_of_its_files(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_rows(tmp_path / f"docs-{number}.jsonl", [{"docid": f"d{number}", "text": f"text {number}"}])
    (tmp_path / ".docs-1.jsonl").write_text("hidden\n")
    (tmp_path / "readme.txt").write_text("no passages\n")
    files = corpus_files([tmp_path], tmp_path / "work")
    assert [path.name for path in files] == ["docs-0.jsonl", "docs-2.jsonl", "docs-10.jsonl"]


def test_passages_without_ids_get_their_places(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"docid": "A", "text": "one", "title": "T"}])
    write_rows(tmp_path / "b.jsonl", [{"text": "two"}, {"_id": "B", "text": "three"}, {"id": 7, "text": "four"}])
    (tmp_path / "work").mkdir()
    (file,) = corpus_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "work")
    found = [(row["docid"], row["title"], row["text"]) for row in read_rows(file)]
    assert found == [("A", "T", "one"), ("1", "", "two"), ("B", "", "three"), ("7", "", "four")]


def test_the_passages_of_rows_are_all_their_texts_once(tmp_path: Path) -> None:
    files = [
        write_rows(tmp_path / "a.jsonl", [{"query": "q", "pos": "one", "neg": ["two", "one", " "]}]),
        write_rows(tmp_path / "b.jsonl", [{"query": "q", "pos": ["Two", "two"]}, {"query": "q", "neg": ["three"]}]),
    ]
    (tmp_path / "work").mkdir()
    (file,) = passages_of_rows(files, tmp_path / "work")
    assert [(row["docid"], row["text"]) for row in read_rows(file)] == [
        ("0", "one"), ("1", "two"), ("2", "Two"), ("3", "three"),
    ]  # fmt: skip


def test_a_store_that_a_kill_left_is_used_for_the_same_texts_only(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "c.jsonl", [{"docid": f"d{i}", "title": "T", "text": f"한강 {i}"} for i in range(3)])
    folder = tmp_path / "store"
    assert list(PassageStore.prepare([corpus], folder)) == [f"한강 {i}" for i in range(3)]
    assert list(PassageStore.prepare([corpus], folder, with_title=True)) == [f"T 한강 {i}" for i in range(3)]
    other = write_rows(tmp_path / "d.jsonl", [{"docid": "d", "text": ""}, {"docid": "e", "text": "one more"}])
    store = PassageStore.prepare([other], folder, with_title=True)
    assert list(store) == ["", "one more"] and len(store) == store.rows == 2
    with pytest.raises(IndexError):
        store[-1]


def draw(tmp_path: Path, source: list[str], *words: str) -> list[dict]:
    output = tmp_path / "o.jsonl"
    given = [*source, "--random_negatives", "--negative_number", "6", "--output_file", str(output), "--overwrite"]
    assert main([*given, *words]) == 0
    return read_rows(output)


def test_every_query_draws_for_itself(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS])
    rows = [{"query": f"q{i}", "pos": [f"P{i}"], "id": i} for i in range(12)]
    words = ["--corpus", str(corpus), "--input_file"]
    found = draw(tmp_path, [*words, str(write_rows(tmp_path / "rows.jsonl", rows))])
    assert len({tuple(row["neg"]) for row in found}) == 12
    # What a query draws depends on its place alone: the first rows of a shorter file draw the same.
    fewer = draw(tmp_path, [*words, str(write_rows(tmp_path / "fewer.jsonl", rows[:5]))])
    assert fewer == found[:5] and [row["id"] for row in fewer] == list(range(5))


def test_grade_0_is_no_positive_and_what_is_missing_is_counted(tmp_path: Path) -> None:
    collection = write_collection(tmp_path / "data")
    qrels = next(collection.rglob("qrels*-train.tsv"))
    qrels.write_text(qrels.read_text() + "q2\tQ0\tnowhere\t1\nq3\tQ0\tnor here\t1\n".replace("nor here", "nor-here"))
    found = draw(tmp_path, ["--data_dir", str(collection), "--language", "ko"])
    by_query = {row["query"]: row["pos"] for row in found}
    assert by_query[QUERIES["q2"]] == [TEXTS[14]] and QUERIES["q9"] not in by_query
    skipped = json.loads((tmp_path / "reports/o.json").read_text())["skipped"]
    assert skipped == {"topics left out: no relevant passage": 1, "relevant passages that the corpus lacks": 2}


def test_one_query_alone_is_reported_as_a_number(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS[:4]])
    source = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["P"]}])
    draw(tmp_path, ["--corpus", str(corpus), "--input_file", str(source)])
    result = json.loads((tmp_path / "reports/o.json").read_text())["result"]
    assert (result["queries"], result["rows"], result["short"], result["without"]) == (1, 1, 1, 0)
    assert result["rows"] is not True and result["share_short"] == 1.0
