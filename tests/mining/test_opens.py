"""How often a command opens the files of its corpus, counted by an audit hook while it runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mining.corpora import TEXTS, write_collection, write_rows

from FlagEmbedding.mining import convert
from FlagEmbedding.mining.hard_negatives.command import main
from FlagEmbedding.utils.identity import fingerprints

_watching: list[Counter[str]] = []


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | bytes | Path):
        _watching[-1][Path(str(arguments[0])).name] += 1


sys.addaudithook(_note)  # a hook stays for the life of the process; it counts only inside `counted`


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often a file of each name is opened meanwhile, by whatever call."""
    _watching.append(Counter())
    yield _watching[-1]
    _watching.pop()


def test_the_hook_sees_every_way_to_open(tmp_path: Path) -> None:
    path = tmp_path / "seen.txt"
    with counted() as opened:
        path.write_text("x")
        with open(path) as stream:
            stream.read()
        fingerprints([path])
    assert opened["seen.txt"] == 3


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    return write_collection(tmp_path / "data")


CORPUS = "docs-0.jsonl.gz"


def test_hard_negatives_of_miracl(collection: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    words = [
        "--data_dir",
        str(collection),
        "--language",
        "ko",
        "--range_for_sampling",
        "0-20",
        "--negative_number",
        "5",
    ]
    words += ["--encoder", str(tiny_model_dir), "--index_save_dir", str(tmp_path / "index"), "--output_file"]
    with counted() as building:
        assert main([*words, str(tmp_path / "a.jsonl")]) == 0
    with counted() as built:
        assert main([*words, str(tmp_path / "b.jsonl")]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (building[CORPUS], built[CORPUS]) == (2, 1)


def test_hard_negatives_of_any_corpus(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"query": "Which?", "pos": ["P"]}])
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"docid": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    words = ["--input_file", str(source), "--corpus", str(corpus), "--negative_number", "5", "--output_file"]
    with counted() as drawing:
        assert main([*words, str(tmp_path / "a.jsonl"), "--random_negatives"]) == 0
    assert drawing["corpus.jsonl"] <= 2  # its first line says of which form it is


def test_convert_reads_the_corpus_once(collection: Path, tmp_path: Path) -> None:
    words = ["--format", "miracl", "--data_dir", str(collection), "--language", "ko"]
    with counted() as opened:
        assert convert.main([*words, "--output_file", str(tmp_path / "o.jsonl")]) == 0
    assert opened[CORPUS] == 1
