"""The contrastive learning penalty (Yu 2024, arXiv 2412.17364).

A hard negative of one query is a good answer to others. The contrastive loss pushes it away from where it stands, and
tears it from these as well. The penalty holds on to them: it grows with the distance between a negative passage and
the queries that it answers itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clp_penalty(p_reps: Tensor, neg_q_reps: Tensor, owner: Tensor) -> Tensor:
    """``mean over negatives n of mean over h* in H*(n) of (1 − cos(n, h*))``.

    H*(n) are the known queries of the negative n. A negative without any is left out of the outer mean. The gradient
    reaches passages and queries alike.

    Args:
        p_reps: passages, ``[M, D]``.
        neg_q_reps: queries of negatives, ``[K, D]``.
        owner: ``[K]`` int64, the passage row that each query belongs to.

    Returns:
        scalar in [0, 2]; 0 when K is 0.
    """
    if not len(owner):
        return p_reps.sum() * 0
    distance = 1 - F.cosine_similarity(neg_q_reps, p_reps.index_select(0, owner), dim=-1)  # [K]
    queries = torch.bincount(owner, minlength=p_reps.shape[0])  # of each passage
    negatives = (queries > 0).sum()
    return (distance / queries[owner]).sum() / negatives


def apply_penalty(loss: Tensor, penalty: Tensor, weight: float) -> Tensor:
    """``(1 − λ) · loss + λ · penalty``, λ = ``weight`` (0.1 in the paper)."""
    return (1 - weight) * loss + weight * penalty
