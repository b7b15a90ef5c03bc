"""Turns drawn rows into padded tensors: two calls of the tokenizer a batch, one for queries, one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from FlagEmbedding.finetune.dataset import TrainExample


@dataclass
class TrainCollator:
    """Collates ``TrainExample``s of one group size.

    Shape legend: B queries, G passages each (group-major: the positive, then G − 1 negatives), K queries of negatives.

    Args:
        tokenizer: of the model.
        query_max_len: tokens of a query, special tokens included; longer ones are cut.
        passage_max_len: the same for passages and for the queries of negatives.
        with_neg_q: False leaves ``neg_q`` out (where the penalty is off, tokenising it is for nothing).
    """

    tokenizer: PreTrainedTokenizerBase
    query_max_len: int = 32
    passage_max_len: int = 128
    with_neg_q: bool = True

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``query``: ``input_ids`` and ``attention_mask``, int64 ``[B, Lq]``;
            ``passage``: the same, ``[B·G, Lp]``;
            ``teacher_scores``: float32 ``[B, G]``, or None;
            ``neg_q``: ``input_ids`` and ``attention_mask`` ``[K, Ln]`` and ``owner`` int64 ``[K]``, the passage row
            (i·G + j) that each answers, or None when the batch has none (a negative may have 0 to n);
            ``bi_directions``: True for a batch of a parallel corpus, as published;
            ``rows``: ``file:line`` of each query, for messages.
        """
        passages = [text for example in examples for text in example.passages]
        questions, owner = self._negative_queries(examples)
        encoded = self._encode(passages + questions, self.passage_max_len)
        neg_q = None
        if questions:
            neg_q = {**self._pad(encoded[len(passages) :]), "owner": torch.tensor(owner, dtype=torch.int64)}
        return {
            "query": self._pad(self._encode([example.query for example in examples], self.query_max_len)),
            "passage": self._pad(encoded[: len(passages)]),
            "teacher_scores": _teacher_scores(examples),
            "neg_q": neg_q,
            "bi_directions": all(example.parallel for example in examples),
            "rows": [example.row for example in examples],
        }

    def _negative_queries(self, examples: Sequence[TrainExample]) -> tuple[list[str], list[int]]:
        texts: list[str] = []
        owner: list[int] = []
        group = len(examples[0].passages)
        for i, example in enumerate(examples if self.with_neg_q else ()):
            for j, queries in enumerate(example.neg_q or (), 1):
                texts += queries
                owner += [i * group + j] * len(queries)
        return texts, owner

    def _encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        return self.tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id or 0), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def _teacher_scores(examples: Sequence[TrainExample]) -> Tensor | None:
    scores = [example.teacher_scores for example in examples if example.teacher_scores is not None]
    if not scores:
        return None
    # The dataset lets no batch mix rows with and without scores.
    assert len(scores) == len(examples), "rows with and without teacher scores in one batch"
    return torch.tensor(scores, dtype=torch.float32)
