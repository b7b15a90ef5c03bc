"""Queries in, hits out: an encoder and the index it made, as plain values. Used by step 1 and by mining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.inference.tokenization import tokenize
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.searcher import Hit, search


@dataclass(frozen=True)
class Retriever:
    """An encoder and the index it made.

    Attributes:
        query_length, passage_length: tokens; the rest is cut off.
        query_instruction, passage_instruction: put before every text.
        threads: of the search.
    """

    encoder: TextEncoder
    index: FlatIndex
    query_length: int = 512
    passage_length: int = 512
    query_instruction: str | None = None
    passage_instruction: str | None = None
    threads: int = 1

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """``[Q, dimension]`` float32."""
        return encode_texts(self.encoder, texts, self.query_length, self.query_instruction)

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        """``[N, dimension]`` float32."""
        return encode_texts(self.encoder, texts, self.passage_length, self.passage_instruction)

    def passage_tokens(self, texts: Sequence[str]) -> list[bytes]:
        """What the encoder reads of each passage: its token ids (int32), cut as they are for the index."""
        prefixed = [(self.passage_instruction or "") + text for text in texts]
        found = tokenize(self.encoder.tokenizer, prefixed, self.encoder.max_length(self.passage_length))
        ends = np.cumsum(found.lengths).tolist()
        return [found.ids[start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]

    def search(self, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """The ``top_k`` best passages per query, ``vectors`` ``[Q, dimension]``; exact, ties broken by docid."""
        return search(self.index, vectors, top_k, threads=self.threads, device=self.encoder.device)

    def row_scores(self, rows: Sequence[int], vector: np.ndarray) -> list[float]:
        """The score of some passages for one query, ``vector`` ``[dimension]``."""
        return inner_products(self.index.read_rows(rows), vector)


def inner_products(vectors: np.ndarray, query: np.ndarray) -> list[float]:
    """``vectors [N, D]`` times ``query [D]`` in double precision, 6 decimals, as the searcher gives scores."""
    return [round(score, 6) for score in (vectors.astype(np.float64) @ query.astype(np.float64)).tolist()]
