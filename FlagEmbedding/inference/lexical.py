"""Texts as token weights in flat arrays: lexical weights of the sparse head, and counts of tokens for BM25.

The same numbers as ``scores.lexical_weights`` gives one dictionary per text, without Python objects per token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from FlagEmbedding.inference.tokenization import TokenRows
from FlagEmbedding.modeling.encoder import Representations


@dataclass(frozen=True)
class TokenWeights:
    """Token ids and weights of N texts, end to end; ids ascend within a text, each once, and weights are above 0.

    Attributes:
        lengths: ``[N]`` int64.
        ids: ``[T]`` int32.
        weights: ``[T]`` float32.
    """

    lengths: np.ndarray
    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and weights of each text."""
        ends = np.cumsum(self.lengths)[:-1]
        return list(zip(np.split(self.ids, ends), np.split(self.weights, ends), strict=True)) if len(self) else []

    @classmethod
    def cat(cls, parts: Sequence[TokenWeights]) -> TokenWeights:
        """The texts of all parts, in order."""
        nothing = cls(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
        every = [nothing, *parts]
        names = ("lengths", "ids", "weights")
        return cls(*(np.concatenate([getattr(part, name) for part in every]) for name in names))


def token_weights(found: Representations, skip: Collection[int]) -> TokenWeights:
    """Each text's greatest weight of each token, without those of ``skip`` and what is not above 0."""
    assert found.token_weights is not None
    weights = found.token_weights.float().reshape(-1).cpu().numpy()
    return _grouped(found.tokens.ids.cpu().numpy(), weights, found.tokens.lengths, skip, np.maximum)


def token_counts(tokens: TokenRows, skip: Collection[int]) -> TokenWeights:
    """How often each text has each token, without those of ``skip``."""
    return _grouped(tokens.ids, np.ones(len(tokens.ids), np.float32), tokens.lengths, skip, np.add)


def _grouped(
    ids: np.ndarray, weights: np.ndarray, lengths: Sequence[int], skip: Collection[int], join: np.ufunc
) -> TokenWeights:
    rows = np.repeat(np.arange(len(lengths)), lengths)
    kept = ~np.isin(ids, list(skip)) & ~(weights <= 0)  # what is not a number stays, to be refused
    rows, ids, weights = rows[kept], ids[kept].astype(np.int64), weights[kept]
    order = np.lexsort((ids, rows))
    rows, ids, weights = rows[order], ids[order], weights[order]
    new = np.ones(len(ids), dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    starts = np.flatnonzero(new)
    joined = join.reduceat(weights, starts) if len(starts) else weights
    return TokenWeights(np.bincount(rows[starts], minlength=len(lengths)), ids[starts].astype(np.int32), joined)
