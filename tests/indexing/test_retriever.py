"""Queries in, hits out: every side with its own length and instruction, scores as the searcher gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.retriever import Retriever, inner_products
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.retrieval.index import FlatIndex

TEXTS = [f"a passage about the river number {i * i} and what it is called in Korean 한강" for i in range(12)]


@pytest.fixture(scope="module")
def retriever(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("retriever")
    corpus = folder / "docs-0.jsonl"
    corpus.write_text("".join(f'{{"docid": "d{i:02d}", "text": "{text}"}}\n' for i, text in enumerate(TEXTS)))
    encoder = TextEncoder(EncoderArguments(encoder=str(tiny_model_dir)))
    options = IndexArguments(12, passage_instruction_for_retrieval="passage: ")
    build_index(encoder, [corpus], folder / "out", "en", options)
    return Retriever(encoder, FlatIndex(folder / "out"), 6, 12, "query: ", "passage: ")


def test_each_side_has_its_length_and_instruction(retriever: Retriever) -> None:
    encoder = retriever.encoder
    np.testing.assert_array_equal(retriever.embed_queries(TEXTS), encode_texts(encoder, TEXTS, 6, "query: "))
    np.testing.assert_array_equal(retriever.embed_passages(TEXTS), encode_texts(encoder, TEXTS, 12, "passage: "))
    assert np.abs(retriever.embed_queries(TEXTS) - retriever.embed_passages(TEXTS)).max() > 1e-3
    bare = replace(retriever, query_instruction=None)
    assert np.abs(bare.embed_queries(TEXTS) - retriever.embed_queries(TEXTS)).max() > 1e-3
    # What was indexed is what embedding a passage gives.
    np.testing.assert_allclose(retriever.index.read_rows(range(12)), retriever.embed_passages(TEXTS), atol=1e-5)


def test_hits_and_scores_of_given_passages_agree(retriever: Retriever) -> None:
    vectors = retriever.embed_passages(TEXTS[3:5])
    for vector, hits in zip(vectors, retriever.search(vectors, 5), strict=True):
        assert len(hits) == 5 and len({hit.docid for hit in hits}) == 5
        assert retriever.row_scores([hit.row for hit in hits], vector) == [hit.score for hit in hits]
    assert retriever.search(vectors, 1)[0][0].docid == "d03"


def test_inner_products_are_exact_to_six_decimals() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32) * 30
    query = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    expected = [round(sum(float(a) * float(b) for a, b in zip(row, query, strict=True)), 6) for row in vectors]
    np.testing.assert_allclose(inner_products(vectors, query), expected, atol=1.1e-6, rtol=0)
