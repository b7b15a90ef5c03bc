"""Representations of all processes as one batch, for ``--negatives_cross_device``.

Ragged parts (token weights, colbert vectors) travel end to end with their lengths. Other processes' rows are
constants; ``all_gather_rows`` scales the own slice's gradient so that DDP's mean is the one-process gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import all_gather_rows, gather_objects, rank


def gather_representations(own: Representations) -> Representations:
    """Every process's rows in rank order. ``padded_length`` becomes the longest of all, as one batch would pad."""
    tokens, gathered = own.tokens, TokenBatch(own.tokens.ids[:0], [], 0)
    if own.token_weights is not None or own.colbert is not None:
        lengths = all_gather_rows(torch.tensor(tokens.lengths, dtype=torch.int64, device=tokens.ids.device)).tolist()
        gathered = TokenBatch(all_gather_rows(tokens.ids), lengths, max(gather_objects(tokens.padded_length)))
    parts = (own.dense, own.token_weights, own.colbert)
    return Representations(gathered, *(None if part is None else all_gather_rows(part) for part in parts))


def gather_owners(owner: Tensor | None, passages: int, device: torch.device) -> Tensor:
    """Owner rows of all processes' negative queries, shifted to the gathered passages' numbering.

    Args:
        owner: ``[K]`` int64 on this process, or None for no rows.
        passages: this process's number of passages.
    """
    counts: list[int] = gather_objects(passages)
    before = sum(counts[: rank()])
    rows = torch.empty(0, dtype=torch.int64, device=device) if owner is None else owner + before
    return all_gather_rows(rows)
