"""Turns drawn rows into flat token batches: two calls of the tokenizer per batch, one for queries, one for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import TrainExample
from FlagEmbedding.finetune.data.twins import say_twins, text_keys_of
from FlagEmbedding.losses.controls import permute_owners
from FlagEmbedding.losses.objective import ObjectiveArguments
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
        objective: which additional parts of a batch are read.
        seed: of what ``--neg_q_control permuted`` draws, together with the rows of a batch.
    """

    tokenizer: PreTrainedTokenizerBase
    options: DataArguments
    with_neg_q: bool = True
    objective: ObjectiveArguments = field(default_factory=ObjectiveArguments)
    seed: int = 0
    _said_twins: bool = field(default=False, init=False, repr=False)

    def __call__(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``query``: B sequences; ``passage``: B·G sequences;
            ``teacher_scores``: float32 ``[B, G]``, or None;
            ``neg_q``: K sequences and ``owner``: int64 ``[K]``, the passage (i·G + j) that each answers, both None when
            the batch has none (a negative may have 0 to n);
            ``rows``: ``file:line`` of each query, for messages;
            ``keys``: the texts as numbers, with ``--mask_twins`` only; ``guide_texts``: the plain queries and passages,
            with ``--guide_model`` only.
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
        owners = [passage for passage, _ in owned]
        if self.objective.neg_q_control == "permuted":
            owners = permute_owners(owners, f"{self.seed}/{'/'.join(example.row for example in examples)}")
        batch = {
            "query": TokenBatch.from_lists(self._encode([e.query for e in examples], self.options.query_max_len)),
            "passage": TokenBatch.from_lists(encoded[: len(passages)]),
            "teacher_scores": torch.tensor(scores, dtype=torch.float32) if scores else None,
            "neg_q": TokenBatch.from_lists(encoded[len(passages) :]) if owned else None,
            "owner": torch.tensor(owners, dtype=torch.int64) if owned else None,
            "rows": [example.row for example in examples],
        }
        return batch | self._plain(examples)

    def _plain(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        """What is made of the texts as they stand in the rows."""
        texts, found = [example.plain for example in examples if example.plain is not None], dict[str, Any]()
        if self.objective.mask_twins:
            found["keys"] = text_keys_of(texts)
        elif not self._said_twins:
            self._said_twins = say_twins(texts, examples)
        if self.objective.guide_model is not None:
            passages = [passage for text in texts for passage in text.passages]
            found["guide_texts"] = {"query": [text.query for text in texts], "passage": passages}
        return found

    def _encode(self, texts: list[str], max_length: int) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        return cast(list[list[int]], encoded["input_ids"])
