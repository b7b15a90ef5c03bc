"""Turns drawn rows into flat token batches: two calls of the tokenizer per batch, one for queries, one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import TrainExample
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
        group = len(examples[0].passages)
        owned = [
            (i * group + j, text)
            for i, example in enumerate(examples if self.with_neg_q else ())
            for j, texts in enumerate(example.neg_q or (), 1)
            for text in texts
        ]
        encoded = self._encode(passages + [text for _, text in owned], self.options.passage_max_len)
        scores = [example.teacher_scores for example in examples if example.teacher_scores is not None]
        # The dataset lets no batch mix rows with and without scores.
        assert len(scores) in (0, len(examples)), "rows with and without teacher scores in one batch"
        return {
            "query": TokenBatch.from_lists(self._encode([e.query for e in examples], self.options.query_max_len)),
            "passage": TokenBatch.from_lists(encoded[: len(passages)]),
            "teacher_scores": torch.tensor(scores, dtype=torch.float32) if scores else None,
            "neg_q": TokenBatch.from_lists(encoded[len(passages) :]) if owned else None,
            "owner": torch.tensor([passage for passage, _ in owned], dtype=torch.int64) if owned else None,
            "rows": [example.row for example in examples],
        }

    def _encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        return cast(list[list[int]], encoded["input_ids"])
