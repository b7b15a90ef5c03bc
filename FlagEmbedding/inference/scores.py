"""From representations to what callers see: lexical weights, ColBERT vectors, and the scores between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from FlagEmbedding.modeling.encoder import Representations

LexicalWeights = dict[str, float]
SCORES = ("colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense")


def lexical_weights(representations: Representations, skip: Collection[int]) -> list[LexicalWeights]:
    """``{token id as text: greatest weight}`` of each text, positive weights only, in order of first appearance."""
    assert representations.token_weights is not None
    ids = representations.tokens.ids.tolist()
    weights = representations.token_weights.float().reshape(-1).tolist()
    texts, start = [], 0
    for length in representations.tokens.lengths:
        found: LexicalWeights = {}
        for token, weight in zip(ids[start : start + length], weights[start : start + length], strict=True):
            if token not in skip and weight > 0 and weight > found.get(key := str(token), 0.0):
                found[key] = weight
        texts.append(found)
        start += length
    return texts


def colbert_vectors(representations: Representations) -> list[np.ndarray]:
    """``[tokens - 1, D]`` float32 of each text (the first token has no vector)."""
    assert representations.colbert is not None
    vectors = representations.colbert.float().cpu().numpy()
    ends = np.cumsum([length - 1 for length in representations.tokens.lengths])
    return np.split(vectors, ends[:-1]) if len(ends) else []


def lexical_matching_score(one: LexicalWeights, other: LexicalWeights) -> float:
    """Sum over common tokens of the product of their weights."""
    return float(sum(weight * other[token] for token, weight in one.items() if token in other))


def colbert_score(query: np.ndarray, passage: np.ndarray) -> torch.Tensor:
    """Mean over query vectors ``[Lq, D]`` of the greatest inner product with a passage vector ``[Lp, D]``.

    Only real tokens take part: a pair's score does not depend on what it was padded to beside others. One thread
    computes it, since the last bits of a product depend on how many do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        similarity = torch.from_numpy(np.ascontiguousarray(query)) @ torch.from_numpy(np.ascontiguousarray(passage)).T
        return similarity.max(dim=-1).values.sum() / len(query)
    finally:
        torch.set_num_threads(threads)


def pair_scores(query: Sequence[Any], passage: Sequence[Any], weights: Sequence[float]) -> dict[str, float]:
    """The five scores of a pair; each side is its dense vector, lexical weights and ColBERT vectors.

    ``weights`` are those of dense, sparse and colbert (upstream's order); the hybrid scores are weighted means.
    """
    on_dense, on_sparse, on_colbert = weights
    dense = float(query[0] @ passage[0])
    sparse = lexical_matching_score(query[1], passage[1])
    colbert = float(colbert_score(query[2], passage[2]))
    both = sparse * on_sparse + dense * on_dense
    return {
        "colbert": colbert,
        "sparse": sparse,
        "dense": dense,
        "sparse+dense": both / (on_sparse + on_dense) if on_sparse + on_dense else 0.0,
        "colbert+sparse+dense": (colbert * on_colbert + both) / sum(weights),
    }
