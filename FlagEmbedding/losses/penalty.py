"""The contrastive learning penalty, CLP (Yu 2024, arXiv 2412.17364).

A hard negative of one query is a good answer to others. The contrastive loss pushes it away from the one query and
tears it from the others on the way. The penalty holds on to them: it grows with the distance between a negative
passage and the queries that it does answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.precision import full_precision


@full_precision
def clp_penalty(p_reps: Tensor, neg_q_reps: Tensor, owner: Tensor) -> Tensor:
    """``mean over negatives n of ( mean over h in H*(n) of (1 − cos(h, n)) )``.

    H*(n) are the known queries of the negative passage n. A negative without any is left out of the outer mean. The
    gradient reaches passages and queries alike. The cosine is a true one: vectors need not be normalized.

    Use it when the negatives of the training data come with queries of their own (``neg_q``).

    Args:
        p_reps: passages, ``[M, D]`` floating.
        neg_q_reps: queries of negatives, ``[K, D]`` floating.
        owner: ``[K]`` int64, the row of ``p_reps`` that each query belongs to, in any order.

    Returns:
        scalar in [0, 2]; 0, still part of the graph, when K is 0.
    """
    if not len(owner):
        return p_reps.sum() * 0 + neg_q_reps.sum() * 0
    distance = 1 - F.cosine_similarity(neg_q_reps, p_reps.index_select(0, owner), dim=-1)  # [K]
    # [M], how many each passage has; bincount would wait for a device to learn its own length.
    queries = torch.zeros(p_reps.shape[0], dtype=torch.int64, device=owner.device)
    queries = queries.index_add(0, owner, torch.ones_like(owner))
    return (distance / queries[owner]).sum() / (queries > 0).sum()


def apply_penalty(loss: Tensor, penalty: Tensor, weight: float) -> Tensor:
    """``(1 − λ) · loss + λ · penalty``. Call it only where a negative of the batch has a query.

    A batch without any keeps its plain loss: scaling it by 1 − λ would weigh such batches less for no reason.

    Args:
        loss, penalty: scalars, everything else that is minimized and ``clp_penalty``.
        weight: λ in [0, 1]; 0.1 in the paper.
    """
    return (1 - weight) * loss + weight * penalty
