"""A small collection in MIRACL's layout with everything mining must mind, and a brute-force ranking of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

NOUNS = ["river", "mountain", "temple", "bridge", "forest", "harbour", "desert", "castle", "island", "valley"]
PLACES = ["Seoul", "Isfahan", "Varanasi", "Busan", "Shiraz", "Jaipur"]
TEXTS = [f"The {noun} of {place} was built {3 * i + j} years ago, {noun} by {noun}." for i, noun in enumerate(NOUNS) for j, place in enumerate(PLACES)]  # fmt: skip  # noqa: E501
# Rows 60 to 62: a positive in other spelling, the same filler twice.
TEXTS += ["THE  River of Seoul was built ０ years ago, river by river. ", "A filler about nothing.", "a filler about  Nothing."]  # fmt: skip  # noqa: E501
QUERIES = {f"q{i}": f"How old is the {noun} of {PLACES[i % 6]}?" for i, noun in enumerate(NOUNS)}
# q0's text is row 0; q1 has two positives, q2 also a passage judged not relevant, q9 none.
QRELS = {
    "q0": {"d0": 1}, "q1": {"d7": 1, "d8": 2}, "q2": {"d14": 1, "d15": 0}, "q9": {"d3": 0},
    **{f"q{i}": {f"d{7 * i % 60}": 1} for i in range(3, 9)},
}  # fmt: skip


def write_collection(root: Path, lang: str = "ko") -> Path:
    """The collection below ``root``."""
    corpus = root / f"miracl-corpus-v1.0-{lang}/docs-0.jsonl.gz"
    corpus.parent.mkdir(parents=True)
    with gzip.open(corpus, "wt", encoding="utf-8") as stream:
        for i, text in enumerate(TEXTS):
            stream.write(json.dumps({"docid": f"d{i}", "title": f"t{i}", "text": text}) + "\n")
    for kind, lines in (
        ("topics", [f"{qid}\t{query}" for qid, query in QUERIES.items()]),
        ("qrels", [f"{qid}\tQ0\t{docid}\t{grade}" for qid, judged in QRELS.items() for docid, grade in judged.items()]),
    ):
        path = root / f"miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-train.tsv"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_collections(folder: Path) -> None:
    """Below ``data`` and ``other`` the collection as ko and fa, each of other queries; one has a dev split."""
    for root in ("data", "other"):
        for lang in ("ko", "fa"):
            write_collection(folder / root, lang)
    for root, lang, keep in (("data", "fa", 3), ("other", "ko", 5)):
        topics = next((folder / root / f"miracl-v1.0-{lang}").rglob("topics*.tsv"))
        topics.write_text("".join(topics.open().readlines()[:keep]))
    for path in list((folder / "data/miracl-v1.0-ko").rglob("*-train.tsv")):
        path.with_name(path.name.replace("-train", "-dev")).write_text("".join(path.open().readlines()[:4]))


def positives(qid: str) -> list[str]:
    return [TEXTS[int(docid[1:])] for docid, grade in QRELS[qid].items() if grade > 0]


@torch.no_grad()
def brute_force(model_dir: Path, texts: list[str]) -> np.ndarray:
    """CLS vectors by transformers alone, one text at a time, normalized, in double precision."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModel.from_pretrained(model_dir).eval()
    rows = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=128)).last_hidden_state
        rows.append(torch.nn.functional.normalize(hidden[0, 0].double(), dim=0).numpy())
    return np.stack(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
