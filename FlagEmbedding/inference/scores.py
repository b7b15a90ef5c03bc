"""From representations to what callers see: lexical weights, ColBERT vectors, and the scores between them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.utils.errors import UsageError

LexicalWeights = dict[str, float]
SCORES = ("colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense")


def lexical_weights(representations: Representations, skip: Collection[int]) -> list[LexicalWeights]:
    """``{token id as text: greatest weight}`` of each row, positive weights only, in order of first appearance."""
    if representations.token_weights is None:
        raise UsageError("lexical weights were not asked for")
    ids = representations.tokens.ids.tolist()
    weights = representations.token_weights.float().reshape(-1).cpu().numpy()
    rows, start = [], 0
    for length in representations.tokens.lengths:
        row: LexicalWeights = {}
        for token, weight in zip(ids[start : start + length], weights[start : start + length], strict=True):
            if token not in skip and weight > 0 and weight > row.get(key := str(token), 0.0):
                row[key] = weight
        rows.append(row)
        start += length
    return rows


def colbert_vectors(representations: Representations) -> list[np.ndarray]:
    """``[tokens - 1, D]`` float32 of each row (the first token has no vector)."""
    if representations.colbert is None:
        raise UsageError("colbert vectors were not asked for")
    vectors = representations.colbert.float().cpu().numpy()
    ends = np.cumsum([length - 1 for length in representations.tokens.lengths])
    return np.split(vectors, ends[:-1]) if len(ends) else []


def lexical_matching_score(one: LexicalWeights, other: LexicalWeights) -> float:
    """Sum over common tokens of the product of their weights."""
    return float(sum(weight * other[token] for token, weight in one.items() if token in other))


def colbert_score(query: np.ndarray, passage: np.ndarray) -> torch.Tensor:
    """Mean over query vectors ``[Lq, D]`` of the greatest inner product with a passage vector ``[Lp, D]``.

    Only real tokens take part: a pair's score does not depend on what it was padded to beside others.
    """
    similarity = torch.from_numpy(np.ascontiguousarray(query)) @ torch.from_numpy(np.ascontiguousarray(passage)).T
    return similarity.max(dim=-1).values.sum() / len(query)


def combine(dense: float, sparse: float, colbert: float, weights: list[float]) -> dict[str, float]:
    """The five scores of one pair; ``weights`` are those of dense, sparse, colbert (upstream's order)."""
    on_dense, on_sparse, on_colbert = weights
    pair = sparse * on_sparse + dense * on_dense
    return {
        "colbert": colbert,
        "sparse": sparse,
        "dense": dense,
        "sparse+dense": pair / (on_sparse + on_dense) if on_sparse + on_dense else 0.0,
        "colbert+sparse+dense": (colbert * on_colbert + pair) / sum(weights),
    }
