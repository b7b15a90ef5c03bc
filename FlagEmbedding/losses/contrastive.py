"""Similarities of queries and passages in three representations, and InfoNCE over them.

Shape legend: B queries, M = B·G passages (each query's positive first, then its G − 1 negatives), D and Dc widths,
T tokens of all rows end to end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ColBERT's token similarities are computed for so many numbers at a time, to bound memory.
_COLBERT_CHUNK = 1 << 26


def dense_scores(q_reps: Tensor, p_reps: Tensor, temperature: float) -> Tensor:
    """``s[i, m] = q_i · p_m / τ``: ``[B, D]`` and ``[M, D]`` to ``[B, M]``. Cosine over τ for unit vectors."""
    return q_reps @ p_reps.T / temperature


def sparse_scores(
    q_ids: Tensor,
    q_weights: Tensor,
    q_lengths: list[int],
    p_ids: Tensor,
    p_weights: Tensor,
    p_lengths: list[int],
    skip_ids: list[int],
    temperature: float,
) -> Tensor:
    """Lexical similarity: ``s[i, m] = Σ_t w_i(t) · w_m(t) / τ``, with w(t) a row's greatest weight of the token t.

    The sum runs over tokens that both rows hold, so only tokens of the queries matter: the rows are laid out over
    these few columns, never over the vocabulary (BGE-M3, Chen et al. 2024, section 3.2, gives the score).

    Args:
        q_ids, p_ids: token ids, ``[T]`` int64, rows end to end; their lengths in ``q_lengths``, ``p_lengths``.
        q_weights, p_weights: non-negative token weights, ``[T]``.
        skip_ids: tokens that count for nothing (cls, pad, eos, unk).

    Returns:
        ``[B, M]``.
    """
    columns = torch.unique(q_ids)  # sorted
    if skip_ids:
        columns = columns[~torch.isin(columns, torch.tensor(skip_ids, device=columns.device))]
    q = _by_column(q_ids, q_weights, q_lengths, columns)
    p = _by_column(p_ids, p_weights, p_lengths, columns)
    return q @ p.T / temperature


def _by_column(ids: Tensor, weights: Tensor, lengths: list[int], columns: Tensor) -> Tensor:
    """Each row's greatest weight for each token of ``columns`` (sorted): ``[N, C]``, 0 where the row lacks it."""
    rows = torch.repeat_interleave(
        torch.arange(len(lengths), device=ids.device), torch.tensor(lengths, device=ids.device), output_size=len(ids)
    )
    table = weights.new_zeros(len(lengths) * len(columns))
    if not len(columns):
        # Keeps the graph whole, so that a batch without shared tokens still has a (zero) gradient.
        return table.view(len(lengths), 0) + weights.sum() * 0
    place = torch.searchsorted(columns, ids).clamp_max(len(columns) - 1)
    found = columns[place] == ids
    cells = (rows * len(columns) + place)[found]
    return table.scatter_reduce(0, cells, weights[found], "amax", include_self=True).view(len(lengths), -1)


def colbert_scores(q_vectors: Tensor, q_mask: Tensor, p_vectors: Tensor, temperature: float) -> Tensor:
    """Late interaction: ``s[i, m] = (1 / n_i) Σ_a max_b q_ia · p_mb / τ`` over the n_i tokens of query i.

    Padding must be zero vectors. A padded passage token takes part in the maximum with similarity 0, as published:
    where all real tokens are less than 0 the score is 0. A padded query token adds 0.

    Args:
        q_vectors: ``[B, Lq, Dc]``, first tokens left out; ``q_mask`` ``[B, Lq]``, True at real tokens.
        p_vectors: ``[M, Lp, Dc]``.

    Returns:
        ``[B, M]``. Source: Khattab and Zaharia 2020; the mean over query tokens is BGE-M3's.
    """
    per_passage = max(1, q_vectors.shape[0] * q_vectors.shape[1] * p_vectors.shape[1])
    parts = []
    for chunk in p_vectors.split(max(1, _COLBERT_CHUNK // per_passage)):
        best = torch.einsum("ian,mbn->iamb", q_vectors, chunk).amax(dim=-1)  # [B, Lq, m]
        parts.append((best * q_mask[:, :, None]).sum(dim=1))
    totals = torch.cat(parts, dim=1)
    return totals / q_mask.sum(dim=1, keepdim=True) / temperature


def info_nce(scores: Tensor, group_size: int) -> Tensor:
    """Contrastive loss over in-batch passages: the mean over i of ``−log softmax(s_i)[i·G]``.

    Every passage of the batch but the query's own positive is a negative (van den Oord et al. 2018).

    Args:
        scores: ``[B, M]``, already divided by the temperature.
        group_size: G.

    Returns:
        scalar.
    """
    targets = torch.arange(scores.shape[0], device=scores.device) * group_size
    return F.cross_entropy(scores, targets)
