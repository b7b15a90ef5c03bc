"""A small collection in MIRACL's layout, and the plain transformers forward to hold vectors against."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.evaluation import runs

WORDS = [
    *("river", "Seoul", "한강", "서울", "رود", "ایران", "गंगा"),
    *("नदी", "fermentation", "kimchi", "sea", "mountain", "long", "short"),
]


def make_passages(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Passages of 1 to 40 words, no two alike."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = generator.choice(WORDS, int(generator.integers(1, 41)))
        rows.append({"docid": f"{i // 3}#{i % 3}", "title": f"title {i}", "text": f"{' '.join(words)} {i}"})
    return rows


def write_collection(root: Path, lang: str, passages: list[dict[str, str]], queries: dict[str, str]) -> Path:
    """``passages`` in two corpus files and ``queries`` as the dev topics."""
    corpus, topics = root / f"miracl-corpus-v1.0-{lang}", root / f"miracl-v1.0-{lang}" / "topics"
    corpus.mkdir(parents=True)
    topics.mkdir(parents=True)
    half = len(passages) // 2
    for number, part in enumerate((passages[:half], passages[half:])):
        with gzip.open(corpus / f"docs-{number}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    lines = "".join(f"{qid}\t{query}\n" for qid, query in queries.items())
    (topics / f"topics.miracl-v1.0-{lang}-dev.tsv").write_text(lines, encoding="utf-8")
    return root


def cells(page: str) -> list[list[str]]:
    """The cells of all lines of Markdown tables in ``page``, headers and rules included."""
    lines = [line.strip().strip("|") for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


QUERIES = {f"{i}-0": f"{word} {i}" for i, word in enumerate(WORDS)}


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three languages: ko with 50 passages, fa and hi with 20."""
    root = tmp_path_factory.mktemp("collection")
    for seed, (lang, count) in enumerate((("ko", 50), ("fa", 20), ("hi", 20))):
        write_collection(root, lang, make_passages(count, seed), QUERIES)
    return root


@pytest.fixture(scope="session")
def reference_vectors() -> Callable[..., np.ndarray]:
    """``(model folder, texts, max_length, pooling) -> [N, D]`` unit vectors, one text at a time, by transformers."""

    @torch.inference_mode()
    def encode(folder: Path, texts: list[str], max_length: int = 128, pooling: str = "cls") -> np.ndarray:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        rows = []
        for text in texts:
            features = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            features.pop("token_type_ids", None)
            hidden = model(**features).last_hidden_state[0]
            vector = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
            rows.append(torch.nn.functional.normalize(vector, dim=0).numpy())
        return np.stack(rows)

    return encode


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs of two models and the judgments under their published name; the working directory."""
    runs.write_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
