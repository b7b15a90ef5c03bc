"""Which passages of a batch are no negatives of a query: they answer it, and pushing them away would be wrong.

Two signs: the text of a passage is that of one of the query's positives (a *twin*), or a model finds it closer to the
query than the positive less a margin. Such passages are left out of the softmax, so that they get no gradient from
that query; for other queries they count as ever. A query's own positive always stays.

The contrastive learning penalty has no mask. It pulls a negative to queries that it does answer, which is right whether
or not the passage also answers the query of its row; nothing in it pushes.

Shape legend: B queries, M = B·G passages (each query's positive first), P positives of all queries, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.options import MarginStrategy
from FlagEmbedding.losses.precision import full_precision


@dataclass
class TextKeys:
    """The texts of a batch as numbers, equal for texts that count as the same; all int64.

    Attributes:
        queries: ``[B]``.
        passages: ``[M]``.
        positives: ``[P]``, all that the rows name, not only those drawn.
        row: ``[P]``, the query that each belongs to.
    """

    queries: Tensor
    passages: Tensor
    positives: Tensor
    row: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextKeys:
        """The same on ``device``. (This method is how accelerate places the batches of a data loader.)"""
        return TextKeys(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> TextKeys:
        """The same in page-locked memory."""
        return TextKeys(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def twin_mask(keys: TextKeys, own: Tensor) -> Tensor:
    """``[B, M]`` bool: passages with the text of one of the query's positives, its own (column ``own[i]``) excepted.

    A query that stands in the batch twice has the positives of both rows.

    Args:
        keys: of the batch.
        own: ``[B]`` int64.
    """
    same = keys.positives[:, None] == keys.passages  # [P, M]
    answers = torch.zeros(len(keys.queries), len(keys.passages), dtype=torch.int64, device=own.device)
    answers = answers.index_add(0, keys.row, same.long())
    # As floats, since devices have no product of integers; what counts is zero or not.
    repeated = keys.queries[:, None] == keys.queries
    found = repeated.float() @ (answers > 0).float() > 0
    return _without_own(found, own)


def pair_twin_mask(keys: TextKeys, own: Tensor) -> Tensor:
    """``[K, M]`` bool: the same for queries of which nothing is known but their positive, passage ``own[k]``."""
    return _without_own(keys.passages[own][:, None] == keys.passages, own)


@torch.no_grad()
@full_precision
def margin_mask(
    queries: Tensor, passages: Tensor, own: Tensor, margin: float, strategy: MarginStrategy = "absolute"
) -> Tensor:
    """``[B, M]`` bool: ``cos(q_i, p_m) > cos(q_i, p_own(i)) − margin``, or for ``relative`` ``− margin · |cos|``.

    Source: Solatorio 2024 (GISTEmbed); the two strategies are those of sentence-transformers' ``GISTEmbedLoss``.

    Args:
        queries: ``[B, D]`` floating, of the model itself or of a guide.
        passages: ``[M, D]`` floating.
        own: ``[B]`` int64, the column of each query's positive.
        margin: below 0 only passages that are closer than the positive by more than this are masked.
        strategy: what the margin is measured in.
    """
    cosines = F.normalize(queries, dim=-1) @ F.normalize(passages, dim=-1).T  # [B, M]
    positive = cosines.gather(1, own[:, None])  # [B, 1]
    room = margin * positive.abs() if strategy == "relative" else margin
    return _without_own(cosines > positive - room, own)


def without_group(mask: Tensor, group_size: int) -> Tensor:
    """``mask`` ``[B, M]`` with each query's own G passages left in: a teacher says itself what they are worth."""
    group = torch.arange(mask.shape[1], device=mask.device) // group_size
    return mask & (group != torch.arange(mask.shape[0], device=mask.device)[:, None])


def _without_own(mask: Tensor, own: Tensor) -> Tensor:
    return mask.scatter(1, own[:, None], False)
