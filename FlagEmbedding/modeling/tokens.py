"""A batch of token rows without padding: all rows end to end, and how long each is.

Shape legend: N rows, T tokens in all, L the longest row as the collator padded it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from FlagEmbedding.utils.hardware import send


@dataclass
class TokenBatch:
    """Rows of token ids, end to end.

    Attributes:
        ids: ``[T]`` int64, row after row.
        lengths: N row lengths, each at least 1.
        padded_length: the row length L that the collator padded to. The published ColBERT score takes its maximum
            over padded passage tokens too, so the value of L is part of a batch's meaning.
    """

    ids: Tensor
    lengths: list[int]
    padded_length: int

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_padded(cls, features: Mapping[str, Tensor]) -> TokenBatch:
        """From ``input_ids`` and ``attention_mask``, both ``[N, L]``; padding may stand on either side."""
        ids, mask = features["input_ids"], features["attention_mask"].bool()
        return cls(ids=ids[mask], lengths=mask.sum(dim=1).tolist(), padded_length=ids.shape[1])

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str | None = None) -> TokenBatch:
        """From lists of ids, one a row; ``padded_length`` is the longest."""
        flat = [token for row in rows for token in row]
        lengths = [len(row) for row in rows]
        return cls(torch.tensor(flat, dtype=torch.int64, device=device), lengths, max(lengths, default=0))

    @classmethod
    def cat(cls, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Rows of several batches, in order; ``padded_length`` becomes the greatest."""
        return cls(
            ids=torch.cat([batch.ids for batch in batches]),
            lengths=[length for batch in batches for length in batch.lengths],
            padded_length=max((batch.padded_length for batch in batches), default=0),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """The same on ``device``. (This method is how accelerate places the batches of a data loader.)"""
        return TokenBatch(self.ids.to(device, non_blocking=non_blocking), self.lengths, self.padded_length)

    def pin_memory(self) -> TokenBatch:
        """The same in page-locked memory. (This method is how a data loader with ``pin_memory`` does it.)"""
        return TokenBatch(self.ids.pin_memory(), self.lengths, self.padded_length)

    def select(self, rows: Sequence[int]) -> TokenBatch:
        """The given rows, in the given order; ``padded_length`` stays."""
        pieces = self.ids.split(self.lengths)  # type: ignore[no-untyped-call]
        ids = torch.cat([pieces[row] for row in rows]) if len(rows) else self.ids[:0]
        return TokenBatch(ids, [self.lengths[row] for row in rows], self.padded_length)

    def mask(self, length: int | None = None) -> Tensor:
        """``[N, length]`` bool, True at real tokens; ``length`` defaults to ``padded_length``."""
        (lengths,) = send([self.lengths], self.ids.device)
        columns = torch.arange(self.padded_length if length is None else length, device=self.ids.device)
        return columns < lengths[:, None]

    def pad(self, pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded ``input_ids`` and ``attention_mask``, both ``[N, length]`` int64 (default ``padded_length``)."""
        mask = self.mask(length)
        ids = self.ids.new_full(mask.shape, pad_id)
        ids[mask] = self.ids
        return ids, mask.long()


def offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of N rows of these lengths begins, and T at the end: ``N + 1`` numbers."""
    return [0, *accumulate(lengths)]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that mean nothing by themselves (cls, eos, pad, unk), sorted; lexical scores leave them out."""
    ids = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return sorted({token for token in ids if isinstance(token, int)})
