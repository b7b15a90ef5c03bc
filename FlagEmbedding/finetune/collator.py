"""Turns drawn rows into flat token batches: two calls of the tokenizer per batch, one for queries, one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.dataset import TrainExample
from FlagEmbedding.modeling.tokens import TokenBatch


@dataclass
class TrainCollator:
    """Collates ``TrainExample``s of one group size.

    Shape legend: B queries, G passages each (group-major: the positive, then G − 1 negatives), K queries of negatives.

    Args:
        tokenizer: of the model.
        options: ``query_max_len`` tokens of a query, special tokens included, ``passage_max_len`` of a passage and of a
            negative's query; longer ones are cut.
        with_neg_q: False leaves ``neg_q`` out (where the penalty is off, tokenizing it is for nothing).
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataArguments
    with_neg_q: bool = True

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``query``: B sequences; ``passage``: B·G sequences;
            ``teacher_scores``: float32 ``[B, G]``, or None;
            ``neg_q``: K sequences and ``owner``: int64 ``[K]``, the passage (i·G + j) that each answers, both None when
            the batch has none (a negative may have 0 to n);
            ``rows``: ``file:line`` of each query, for messages.
        """
        passages = [text for example in examples for text in example.passages]
        questions, owner = self._negative_queries(examples)
        encoded = self._encode(passages + questions, self.options.passage_max_len)
        queries = self._encode([example.query for example in examples], self.options.query_max_len)
        return {
            "query": TokenBatch.from_lists(queries),
            "passage": TokenBatch.from_lists(encoded[: len(passages)]),
            "teacher_scores": _teacher_scores(examples),
            "neg_q": TokenBatch.from_lists(encoded[len(passages) :]) if questions else None,
            "owner": torch.tensor(owner, dtype=torch.int64) if questions else None,
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
        encoded = self.tokenizer(
            texts, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        return cast(list[list[int]], encoded["input_ids"])


def _teacher_scores(examples: Sequence[TrainExample]) -> Tensor | None:
    scores = [example.teacher_scores for example in examples if example.teacher_scores is not None]
    if not scores:
        return None
    # The dataset lets no batch mix rows with and without scores.
    assert len(scores) == len(examples), "rows with and without teacher scores in one batch"
    return torch.tensor(scores, dtype=torch.float32)
