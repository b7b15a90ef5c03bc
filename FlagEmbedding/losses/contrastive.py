"""Similarities of queries and passages in three representations, and InfoNCE over them.

Everything is a function of embeddings or scores; no model, no tokenizer. Inputs may be half precision, results are
float32 (float64 for float64 inputs): see ``precision``.

Shape legend: B queries, M = B·G passages (each query's positive first, then its G − 1 negatives), D and Dc widths,
T tokens of all sequences end to end, Lq and Lp the padded lengths without the first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.precision import full_precision
from FlagEmbedding.utils.hardware import send

# ColBERT's token similarities are held for so many numbers at a time (256 MiB of float32).
_COLBERT_CHUNK = 1 << 26


@full_precision
def dense_scores(q_reps: Tensor, p_reps: Tensor, temperature: float) -> Tensor:
    """Similarity of whole texts, ``[B, M]``: ``s[i, m] = q_i · p_m / τ``, the cosine over τ for unit vectors.

    Args:
        q_reps: ``[B, D]`` floating.
        p_reps: ``[M, D]`` floating.
        temperature: τ > 0; 1 where the vectors are not normalized.
    """
    return q_reps @ p_reps.T / temperature


@full_precision
def sparse_scores(
    q_ids: Tensor, q_weights: Tensor, q_lengths: list[int], p_ids: Tensor, p_weights: Tensor, p_lengths: list[int],
    skip_ids: list[int], temperature: float,
) -> Tensor:  # fmt: skip
    """Lexical similarity, ``[B, M]``: ``s[i, m] = Σ_t w_i(t) · w_m(t) / τ``, w(t) a text's greatest weight of token t.

    The sum runs over tokens that both hold, so only tokens of the queries can matter: sequences are laid out over
    these few columns. Value and gradient equal those of vocabulary-wide vectors, which are never made (for 8 queries
    of 128 tokens at most 1024 columns against XLM-R's 250 002).

    For unified fine-tuning. Source: Chen et al. 2024 (BGE-M3), section 3.2.

    Args:
        q_ids, p_ids: token ids, ``[T]`` int64, sequences end to end.
        q_weights, p_weights: token weights ≥ 0, ``[T]`` floating.
        q_lengths, p_lengths: tokens of each sequence, B and M numbers.
        skip_ids: tokens that count for nothing (cls, pad, eos, unk).
        temperature: τ > 0.
    """
    if q_ids.device.type == "cpu":
        columns = torch.unique(q_ids)  # sorted
        columns = columns[~torch.isin(columns, columns.new_tensor(skip_ids))]
    else:
        columns = _distinct_sorted(q_ids, skip_ids)
    queries = _by_column(q_ids, q_weights, q_lengths, columns)  # [B, C]
    passages = _by_column(p_ids, p_weights, p_lengths, columns)  # [M, C]
    return queries @ passages.T / temperature


def _distinct_sorted(ids: Tensor, skip_ids: list[int]) -> Tensor:
    """``[T]``: distinct ids in order, then a number that is no id; the same length whatever they are."""
    nobody = torch.iinfo(ids.dtype).max
    for skipped in skip_ids:
        ids = torch.where(ids == skipped, nobody, ids)
    ids = ids.sort().values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[1:] = ids[1:] == ids[:-1]
    return torch.where(repeated, nobody, ids).sort().values


def _by_column(ids: Tensor, weights: Tensor, lengths: list[int], columns: Tensor) -> Tensor:
    """Each sequence's greatest weight for each token of ``columns`` (sorted): ``[N, C]``, 0 where it lacks it."""
    if not len(columns):
        # Keeps the graph whole: a batch without any shared token still has a gradient, of zeros.
        return weights.new_zeros(len(lengths), 0) + weights.sum() * 0
    (rows,) = send([[row for row, length in enumerate(lengths) for _ in range(length)]], ids.device)
    place = torch.searchsorted(columns, ids).clamp_max(len(columns) - 1)
    found = columns[place] == ids
    # Tokens that no query has fall into one cell more, which nobody reads (a mask would wait for the device).
    cells = torch.where(found, rows * len(columns) + place, len(lengths) * len(columns))
    table = weights.new_zeros(len(lengths) * len(columns) + 1)
    return table.scatter_reduce(0, cells, weights, "amax")[:-1].view(len(lengths), len(columns))


@full_precision
def colbert_scores(q_vectors: Tensor, q_mask: Tensor, p_vectors: Tensor, temperature: float) -> Tensor:
    """Late interaction, ``[B, M]``: ``s[i, m] = (1 / n_i) · Σ_a max_b (q_ia · p_mb) / τ``, a over query i's n_i tokens.

    Padding must be zero vectors. A padded passage token takes part in the maximum with similarity 0, as published:
    the best of a padded passage is never below 0. A padded query token adds 0. A query without tokens scores 0.

    Passages go through in chunks, and of each chunk the backward pass keeps the winners' positions alone, so memory
    does not grow with B·Lq·M·Lp.

    For unified fine-tuning. Source: Khattab and Zaharia 2020 (ColBERT); the mean over query tokens is BGE-M3's.

    Args:
        q_vectors: ``[B, Lq, Dc]`` floating, first tokens left out.
        q_mask: ``[B, Lq]`` bool or 0/1, true at real tokens.
        p_vectors: ``[M, Lp, Dc]`` floating, first tokens left out.
        temperature: τ > 0.
    """
    per_passage = max(1, q_vectors.shape[0] * q_vectors.shape[1] * p_vectors.shape[1])
    parts = []
    for chunk in p_vectors.split(max(1, _COLBERT_CHUNK // per_passage)):  # type: ignore[no-untyped-call]
        # max rather than amax: its backward needs the indices, amax's the whole similarity tensor.
        best = torch.einsum("iad,mbd->iamb", q_vectors, chunk).max(dim=-1).values  # [B, Lq, m]
        parts.append((best * q_mask[:, :, None]).sum(dim=1))
    return torch.cat(parts, dim=1) / q_mask.sum(dim=1, keepdim=True).clamp_min(1) / temperature


@full_precision
def info_nce(scores: Tensor, group_size: int) -> Tensor:
    """Contrastive loss over in-batch passages, a scalar: ``mean_i −log( exp s[i, i·G] / Σ_m exp s[i, m] )``.

    Every passage of the batch but the query's own positive is a negative. The loss of choice without a teacher.
    Source: van den Oord et al. 2018 (CPC); in-batch negatives as in Karpukhin et al. 2020 (DPR).

    Args:
        scores: ``[B, M]`` floating, already divided by the temperature.
        group_size: G, passages per query.
    """
    targets = torch.arange(scores.shape[0], device=scores.device) * group_size
    return F.cross_entropy(scores, targets)
