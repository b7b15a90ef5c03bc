"""What a role's sequences became, and how parts of it are put together and taken apart.

Shape legend: N sequences, T tokens in all, D hidden size, Dc width of colbert vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.hardware import send


@dataclass
class Representations:
    """What one role's sequences became.

    Attributes:
        tokens: the sequences.
        dense: ``[N, D]`` or None.
        token_weights: ``[T]``, relu of the sparse head for every token, or None.
        colbert: ``[T - N, Dc]``, sequences end to end without their first tokens, or None.
    """

    tokens: TokenBatch
    dense: Tensor | None = None
    token_weights: Tensor | None = None
    colbert: Tensor | None = None

    def colbert_padded(self) -> tuple[Tensor, Tensor]:
        """Colbert vectors as ``[N, padded_length - 1, Dc]``, zeros at padding, and their bool mask."""
        if self.colbert is None:
            raise ValueError("colbert vectors were not asked for")
        mask = self.tokens.mask()[:, 1:]
        width = mask.shape[1]
        cells = [n * width + column for n, own in enumerate(self.tokens.lengths) for column in range(own - 1)]
        padded = self.colbert.new_zeros(mask.numel(), self.colbert.shape[-1])
        # index_put keeps the gradient.
        padded = padded.index_put((send([cells], self.colbert.device)[0],), self.colbert)
        return padded.view(*mask.shape, -1), mask


def join(
    parts: Sequence[Representations],
    tokens: TokenBatch,
    place: Sequence[int] | None = None,
    places: Tensor | None = None,
) -> Representations:
    """The parts' sequences as those of ``tokens``: sequence i is number ``place[i]`` of the parts' (None: the same).

    ``places`` are the same numbers on the device, if they are there already.
    """

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if values and values[0] is not None else None

    dense, weights, colbert = cat("dense"), cat("token_weights"), cat("colbert")
    if place is None:
        return Representations(tokens, dense, weights, colbert)
    lengths = [length for part in parts for length in part.tokens.lengths]

    def ragged(vectors: Tensor | None, less: int) -> Tensor | None:
        if vectors is None:
            return None
        pieces = vectors.split([length - less for length in lengths])  # type: ignore[no-untyped-call]
        return torch.cat([pieces[position] for position in place])

    if dense is not None:
        dense = dense.index_select(0, send([place], dense.device)[0] if places is None else places)
    return Representations(tokens, dense, ragged(weights, 0), ragged(colbert, 1))


def split(part: Representations, batches: Sequence[TokenBatch]) -> list[Representations]:
    """Cut the sequences back into the roles that they came from."""
    counts = [len(batch) for batch in batches]
    tokens = [len(batch.ids) for batch in batches]

    def cut(value: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
        return [None] * len(batches) if value is None else list(value.split(sizes))  # type: ignore[no-untyped-call]

    dense = cut(part.dense, counts)
    weights = cut(part.token_weights, tokens)
    colbert = cut(part.colbert, [t - n for t, n in zip(tokens, counts, strict=True)])
    return [Representations(*parts) for parts in zip(batches, dense, weights, colbert, strict=True)]
