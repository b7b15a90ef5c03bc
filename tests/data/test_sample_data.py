"""The sample data, record by record: layout, splits, true neg_q, near misses, script of the language, reproducible."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE, SAMPLE = REPOSITORY / "data" / "sample_source", REPOSITORY / "data" / "sample"
LANGUAGES = ("ko", "fa", "hi", "en")
SCRIPTS = {"ko": "HANGUL", "fa": "ARABIC", "hi": "DEVANAGARI", "en": "LATIN"}


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def source(lang: str) -> list[dict]:
    return [json.loads(line) for line in lines(SOURCE / f"{lang}.jsonl")]


def in_script(text: str, lang: str) -> float:
    letters = [char for char in text if char.isalpha()]
    return sum(unicodedata.name(char, "").startswith(SCRIPTS[lang]) for char in letters) / len(letters)


def test_all_languages_are_there() -> None:
    assert sorted(path.stem for path in SOURCE.glob("*.jsonl")) == sorted(LANGUAGES)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_source_passages(lang: str) -> None:
    passages = source(lang)
    assert len(passages) >= 60
    assert sum(len(p["queries"]) for p in passages) >= 120
    assert len({p["docid"] for p in passages}) == len({p["text"] for p in passages}) == len(passages)
    queries = [query for p in passages for query in p["queries"]]
    assert len(set(queries)) == len(queries)
    topics = Counter(p["topic"] for p in passages)
    assert len(topics) >= 12
    assert min(topics.values()) >= 3, "every topic needs near misses"
    for p in passages:
        assert set(p) == {"docid", "topic", "split", "title", "text", "queries"}
        assert p["split"] in ("train", "dev")
        assert p["docid"].startswith(f"{lang}-{p['topic']}-")
        assert 30 <= len(p["text"].split()) <= 130, p["docid"]
        assert len(p["queries"]) >= 2
        for text in (p["title"], p["text"], *p["queries"]):
            assert text == text.strip() and text and "\t" not in text and "\n" not in text
            assert unicodedata.is_normalized("NFC", text), (p["docid"], text)
        assert in_script(p["text"], lang) > 0.8, p["docid"]
        assert all(in_script(query, lang) > 0.6 for query in p["queries"]), p["docid"]
        assert lang != "fa" or not re.search("[يك]", p["text"] + "".join(p["queries"])), "Arabic letters in Persian"
        for query in p["queries"]:
            words = query.split()
            copied = [" ".join(words[i : i + 6]) for i in range(len(words) - 5)]
            assert not any(run in p["text"] for run in copied), f"{p['docid']}: a query copies its passage"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_miracl_layout(lang: str) -> None:
    passages = {p["docid"]: p for p in source(lang)}
    with gzip.open(SAMPLE / f"miracl-corpus-v1.0-{lang}" / "docs-0.jsonl.gz", "rt", encoding="utf-8") as stream:
        corpus = [json.loads(line) for line in stream]
    assert {doc["docid"] for doc in corpus} == set(passages)
    for doc in corpus:
        assert doc == {key: passages[doc["docid"]][key] for key in ("docid", "title", "text")}
    answered: dict[str, set[str]] = {}
    for split in ("train", "dev"):
        topics = dict(
            line.split("\t")
            for line in lines(SAMPLE / f"miracl-v1.0-{lang}/topics/topics.miracl-v1.0-{lang}-{split}.tsv")
        )
        qrels = [
            line.split("\t")
            for line in lines(SAMPLE / f"miracl-v1.0-{lang}/qrels/qrels.miracl-v1.0-{lang}-{split}.tsv")
        ]
        assert {qid for qid, *_ in qrels} == set(topics)
        answered[split] = set()
        for qid, query in topics.items():
            judged = {docid: int(grade) for q, _, docid, grade in qrels if q == qid}
            (relevant,) = [docid for docid, grade in judged.items() if grade]
            assert query in passages[relevant]["queries"]
            assert passages[relevant]["split"] == split
            assert {passages[docid]["topic"] for docid in judged} == {passages[relevant]["topic"]}
            answered[split].add(relevant)
    assert not answered["train"] & answered["dev"]
    assert answered["train"] | answered["dev"] == set(passages)
    assert len(answered["dev"]) >= 20


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("kind", ["CLPL", "random"])
def test_training_rows(lang: str, kind: str) -> None:
    by_text = {p["text"]: p for p in source(lang)}
    folder = "train" if kind == "CLPL" else "train_random"
    rows = [json.loads(line) for line in lines(SAMPLE / folder / f"{lang}_{kind}_train_data.jsonl")]
    train = [p for p in by_text.values() if p["split"] == "train"]
    assert sorted(row["query"] for row in rows) == sorted(query for p in train for query in p["queries"])
    near = 0
    for row in rows:
        assert list(row) == ["query", "pos", "neg", "neg_q"]
        (positive,) = (by_text[text] for text in row["pos"])
        assert row["query"] in positive["queries"]
        assert len(row["neg"]) == len(set(row["neg"])) == len(row["neg_q"]) == 7
        for negative, question in zip(row["neg"], row["neg_q"], strict=True):
            passage = by_text[negative]
            assert passage["split"] == "train"
            assert passage is not positive
            assert question in passage["queries"]
        near += sum(by_text[negative]["topic"] == positive["topic"] for negative in row["neg"])
    if kind == "CLPL":
        available = sum(
            other["topic"] == by_text[row["pos"][0]]["topic"] and other["text"] != row["pos"][0]
            for row in rows
            for other in train
        )
        assert near == available > len(rows)


def test_the_build_repeats(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("build_sample", REPOSITORY / "data" / "build_sample.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.build(tmp_path)
    files = sorted(p.relative_to(SAMPLE) for p in SAMPLE.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for file in files:
        # What gzip writes depends on the zlib at hand; what it holds does not.
        read = gzip.open if file.suffix == ".gz" else open
        with read(SAMPLE / file, "rb") as ours, read(tmp_path / file, "rb") as theirs:
            assert ours.read() == theirs.read(), file
