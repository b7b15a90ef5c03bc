"""Mining from BEIR's layout and from a language of one's own gives the rows of MIRACL's layout of the same data."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from mining.corpora import QRELS, QUERIES, TEXTS, read_rows, write_collection

from FlagEmbedding.mining import convert
from FlagEmbedding.mining.common.passages import corpus_files
from FlagEmbedding.mining.hard_negatives.command import main

LANG = "xx"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    miracl, beir = (tmp_path_factory.mktemp(name) for name in ("miracl", "beir"))
    write_collection(miracl, LANG)
    (beir / "qrels").mkdir()
    for name, rows in (
        ("corpus", [{"_id": f"d{i}", "title": f"t{i}", "text": text} for i, text in enumerate(TEXTS)]),
        ("queries", [{"_id": qid, "text": query} for qid, query in QUERIES.items()]),
    ):
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"{qid}\t{docid}\t{grade}\n" for qid, found in QRELS.items() for docid, grade in found.items())
    (beir / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return [miracl, beir]


def test_the_same_negatives_from_both_layouts(tiny_model_dir: Path, layouts: list[Path], tmp_path: Path) -> None:
    found = []
    for place in layouts:
        words = [
            "--data_dir",
            place,
            "--language",
            LANG,
            "--encoder",
            tiny_model_dir,
            "--output_file",
            tmp_path / place.name,
        ]
        words += ["--index_save_dir", tmp_path / f"index-{place.name}", "--range_for_sampling", "2-20"]
        assert main([str(word) for word in [*words, "--negative_number", "4"]]) == 0
        found.append(read_rows(tmp_path / place.name))
    assert found[0] == found[1] and len(found[0]) == 9
    packed = [*words, "--negative_number", "4", "--output_file", tmp_path / "rows.jsonl.gz"]
    assert main([str(word) for word in packed]) == 0
    with gzip.open(tmp_path / "rows.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == found[0]
    assert (tmp_path / "reports/rows.json").is_file()


def test_convert_reads_both_layouts_by_language(layouts: list[Path], tmp_path: Path) -> None:
    found = []
    for place in layouts:
        words = ["--format", "miracl", "--data_dir", place, "--language", LANG, "--with_title", "n"]
        assert convert.main([str(word) for word in [*words, "--output_file", tmp_path / place.name]]) == 0
        found.append(read_rows(tmp_path / place.name))
    assert found[0] == found[1] and len(found[0]) == 9


def test_a_corpus_shorter_than_the_window_is_pointed_out(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("FlagEmbedding"), "propagate", True)
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "pos": ["one"]}\n{"query": "b", "pos": ["two"]}\n')
    words = [
        "--input_file",
        tmp_path / "rows.jsonl",
        "--encoder",
        tiny_model_dir,
        "--output_file",
        tmp_path / "o.jsonl",
    ]
    with caplog.at_level(logging.WARNING):
        assert main([str(word) for word in [*words, "--index_dir", tmp_path / "i", "--negative_number", "1"]]) == 0
    said = "--range_for_sampling 10-210: the corpus holds 2 passages, ranks 11 to 210 are not there"
    assert any(said in record.getMessage() for record in caplog.records)


def test_a_folder_of_miracls_files_is_these_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("docs-10.jsonl", "docs-9.jsonl", "old_docs-1.jsonl", "._docs-0.jsonl"):
        (tmp_path / name).write_text('{"docid": "a", "title": "", "text": "x"}\n')
    assert [path.name for path in corpus_files([tmp_path], tmp_path / "work")] == ["docs-9.jsonl", "docs-10.jsonl"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"id": 5, "text": "y"}', ":2: docid '5' was there before"),
        ('{"id": true, "text": "y"}', ":2: docid is true"),
        ('{"id": "", "text": "y"}', ":2: docid is empty text"),
        ('{"text": "\\u200b"}', ":2: text is missing or empty"),
        ('{"text": "a\\ud800"}', ":2: half of a surrogate pair"),
        ('{"text": "a", "title": ["t"]}', ":2: title is a list"),
    ],
)
def test_passages_that_cannot_be_used_are_named_where_they_stand(tmp_path: Path, second: str, message: str) -> None:
    from FlagEmbedding.utils.errors import DataError

    path = tmp_path / "pool.jsonl"
    path.write_text(f'{{"id": 5, "text": "x"}}\n{second}\n')
    (tmp_path / "work").mkdir()
    with pytest.raises(DataError) as caught:
        corpus_files([path], tmp_path / "work")
    assert str(caught.value).startswith(f"{path}{message}")
