"""Rows whose negatives wait for queries, out of the sample's Persian passages; a reranker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from FlagEmbedding.collections.corpus import read_file


@pytest.fixture(scope="module")
def texts(sample_dir: Path) -> list[str]:
    return [p.text for p in read_file(sample_dir / "miracl-corpus-v1.0-fa/docs-0.jsonl.gz")]


@pytest.fixture
def rows(texts: list[str], tmp_path: Path) -> list[dict]:
    """20 queries on passages 0 to 19; negatives are three of those and two of passages 20 to 59, nobody's positives."""
    rows = []
    for i in range(20):
        negatives = [texts[(i + step) % 20] for step in (1, 5, 7)] + [texts[20 + 2 * i], texts[20 + (2 * i + 1) % 40]]
        rows.append({"query": f"پرسش شماره {i}", "pos": [texts[i]], "neg": negatives, "pos_scores": [1.0], "extra": i})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="session")
def cross_encoder_dir(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT reranker of one label, its head wide enough that scores differ."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reranker") / "tiny-reranker"
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=1)
    torch.nn.init.normal_(model.classifier.weight, std=0.6)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(folder)
    return folder
