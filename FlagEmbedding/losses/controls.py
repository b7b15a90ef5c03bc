"""Controls of the contrastive learning penalty: the same texts, other pulls.

``losses.penalty`` pulls each negative to queries that it answers. Whether that, or any pull, or the additional texts in
a step, changes a model, these tell: the same pull on other pairs, and the same pairs as rows of the contrastive loss.

Shape legend: B queries, M = B·G passages, K queries of negatives.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.penalty import clp_penalty
from FlagEmbedding.losses.precision import full_precision


def permute_owners(owners: Sequence[int], seed: str) -> list[int]:
    """The owners after each passage has handed its queries on to another one: a random ring over all that have any.

    No passage keeps its own, unless it is the only one; how many queries each pull has stays.

    Args:
        owners: the passage of each query.
        seed: what the ring is drawn by.
    """
    ring = sorted(set(owners))
    random.Random(seed).shuffle(ring)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [following[owner] for owner in owners]


def positive_penalty(q_reps: Tensor, p_reps: Tensor, owner: Tensor) -> Tensor:
    """``mean (1 − cos(query, its positive))`` over the queries of whom a negative has a query; see ``clp_penalty``.

    Args:
        q_reps: queries, ``[B, D]`` floating.
        p_reps: passages, ``[M, D]`` floating.
        owner: ``[K]`` int64, the passages that have queries.
    """
    group_size = p_reps.shape[0] // q_reps.shape[0]
    row = owner // group_size
    return clp_penalty(p_reps, q_reps.index_select(0, row), row * group_size)


@full_precision
def pair_rows(scores: Tensor, owner: Tensor) -> Tensor:
    """The contrastive loss of the pairs, each a row of its own: the mean over K.

    Args:
        scores: of the K queries with all passages, ``[K, M]`` floating, over the temperature, −∞ where masked.
        owner: ``[K]`` int64, the passage that each query's answer is.
    """
    return F.cross_entropy(scores, owner)


def with_pair_rows(loss: Tensor, rows: int, pairs: Tensor, count: int) -> Tensor:
    """The contrastive loss over the batch's ``rows`` and ``count`` pairs: the mean over all of them, of two means."""
    share = count / (rows + count)
    return (1 - share) * loss + share * pairs


def unused(loss: Tensor, penalty: Tensor) -> Tensor:
    """``loss``, with the penalty computed, differentiated, and counted for nothing."""
    return loss + 0 * penalty
