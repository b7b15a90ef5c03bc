"""How many tokens a run's batches hold: counted from the rows that it will draw, or estimated from some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from FlagEmbedding.finetune.data.dataset import Key, TrainDataset
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler

MOST_ROWS = 1_000  # so many draws of a row are tokenized; a longer run is estimated from as many


@dataclass(frozen=True)
class RoleCounts:
    """Texts of one role in the batches that were looked at.

    Attributes:
        texts: how many.
        cut: how many of them are longer than is read.
        tokens: what is read, special tokens included.
        padded: what it would be with every micro-batch padded to its longest text.
        limit: how many tokens of a text are read.
    """

    texts: int
    cut: int
    tokens: int
    padded: int
    limit: int


@dataclass(frozen=True)
class Counts:
    """What micro-batches hold.

    Attributes:
        roles: of ``query``, ``passage`` and ``neg_q``.
        looked_at: micro-batches that were counted.
        every: micro-batches of the whole run.
        queries: the fewest and the most queries in one.
    """

    roles: dict[str, RoleCounts]
    looked_at: int
    every: int
    queries: tuple[int, int]

    @property
    def counted(self) -> bool:
        """True where every micro-batch of the run was looked at."""
        return self.looked_at == self.every

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return round(sum(role.tokens for role in self.roles.values()) * self.every / self.looked_at)

    @property
    def padding(self) -> float:
        """Share of padded batches that is padding."""
        padded = sum(role.padded for role in self.roles.values())
        return 1 - sum(role.tokens for role in self.roles.values()) / padded


def micro_batches(sampler: TaskBatchSampler, per_step: int, steps: int) -> int:
    """Of all processes in ``steps`` optimizer steps; the last step of an epoch may have fewer than ``per_step``."""
    whole, rest = divmod(steps, math.ceil(len(sampler) / per_step))
    return whole * len(sampler) + min(rest * per_step, len(sampler))


def count(sampler: TaskBatchSampler, tokenizer: Any, per_step: int, steps: int, with_neg_q: bool) -> Counts:
    """Tokenize what ``steps`` optimizer steps draw, or evenly spread batches of the first epoch where that is much.

    Args:
        per_step: micro-batches of one step, over all processes.
        with_neg_q: the queries of negatives are encoded too.
    """
    every, dataset = micro_batches(sampler, per_step, steps), sampler.dataset
    batches = _epoch(sampler, 0)
    if every * max(map(len, batches)) <= MOST_ROWS:
        for epoch in range(1, math.ceil(every / len(sampler))):
            batches += _epoch(sampler, epoch)
        batches = batches[:every]
    else:
        few = max(1, MOST_ROWS // max(map(len, batches)))
        batches = batches[:every]
        batches = [batches[number * len(batches) // few] for number in range(min(few, len(batches)))]
    roles = _roles(batches, dataset, tokenizer, with_neg_q)
    sizes = [len(keys) for keys in batches]
    return Counts(roles, len(batches), every, (min(sizes), max(sizes)))


def _epoch(sampler: TaskBatchSampler, epoch: int) -> list[list[Key]]:
    before = sampler.dataset.epoch
    sampler.set_epoch(epoch)
    batches = list(sampler)
    sampler.set_epoch(before)
    return batches


def _roles(
    batches: Sequence[list[Key]], dataset: TrainDataset, tokenizer: Any, with_neg_q: bool
) -> dict[str, RoleCounts]:
    limits = {"query": dataset.options.query_max_len, "passage": dataset.options.passage_max_len}
    limits |= {"neg_q": limits["passage"]} if with_neg_q else {}
    sums = {role: [0, 0, 0, 0] for role in limits}
    for keys in batches:
        examples = [dataset[key] for key in keys]
        texts = {
            "query": [example.query for example in examples],
            "passage": [text for example in examples for text in example.passages],
            "neg_q": [text for example in examples for own in example.neg_q or () for text in own],
        }
        for role, limit in limits.items():
            lengths = _lengths(tokenizer, texts[role])
            read = [min(length, limit) for length in lengths]
            cut = sum(length > limit for length in lengths)
            found = (len(lengths), cut, sum(read), len(read) * max(read, default=0))
            sums[role] = [before + new for before, new in zip(sums[role], found, strict=True)]
    return {
        role: RoleCounts(texts, cut, tokens, padded, limits[role])
        for role, (texts, cut, tokens, padded) in sums.items()
        if texts
    }


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of whole texts."""
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]
