"""What a batch's passages and the negatives' own queries do beside the contrastive loss: masks, penalty, controls.

Masks are made of the whole batch, with ``--negatives_cross_device`` that of all processes: every process then leaves
out the same passages. Nothing here has a gradient but the penalty and the pairs' rows.

Shape legend: B queries, G passages each, M = B·G passages, K queries of negatives, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from FlagEmbedding.losses.contrastive import dense_scores
from FlagEmbedding.losses.controls import pair_rows, positive_penalty, unused, with_pair_rows
from FlagEmbedding.losses.false_negatives import TextKeys, margin_mask, pair_twin_mask, twin_mask, without_group
from FlagEmbedding.losses.matryoshka import Widths, mean_over_widths
from FlagEmbedding.losses.objective import ObjectiveArguments, Terms, add_penalty
from FlagEmbedding.losses.penalty import clp_penalty
from FlagEmbedding.utils.distributed import all_gather_rows, gather_counts


class Guided(NamedTuple):
    """A guide's vectors of the batch, ``[B, Dg]`` and ``[M, Dg]``."""

    queries: Tensor
    passages: Tensor


class GuideModel(Protocol):
    """What a guide does; ``finetune.guide`` has it."""

    @property
    def held(self) -> int:
        """Bytes of its weights."""

    def __call__(self, texts: Mapping[str, Sequence[str]]) -> Guided:
        """Vectors of the plain texts of ``query`` and ``passage``."""


@dataclass
class FalseNegatives:
    """Finds them in one batch.

    Attributes:
        options: which are looked for.
        keys: the texts, where twins are.
        guided: vectors of a guide; None: those of the model itself.
        found: how many passages were masked, summed over all rows, by the log's names.
    """

    options: ObjectiveArguments
    keys: TextKeys | None
    guided: Guided | None

    def __post_init__(self) -> None:
        self.found: Terms = {}

    def shared(self, device: torch.device) -> FalseNegatives:
        """Of all processes' batches, in rank order. A collective: which run depends on the options alone."""
        keys, guided = self.keys, self.guided
        if keys is not None:
            every = gather_counts([len(keys.queries), len(keys.passages), len(keys.positives)], device)
            queries, passages, positives = map(list, zip(*every, strict=True))
            row = all_gather_rows(keys.row, positives)
            before = [0, *accumulate(queries)][: len(queries)]
            parts = zip(row.split(positives), before, strict=True)  # type: ignore[no-untyped-call]
            keys = TextKeys(
                all_gather_rows(keys.queries, queries),
                all_gather_rows(keys.passages, passages),
                all_gather_rows(keys.positives, positives),
                torch.cat([part + first for part, first in parts]),
            )
        if guided is not None:
            guided = Guided(*map(all_gather_rows, guided))
        return FalseNegatives(self.options, keys, guided)

    def mask(self, q_reps: Tensor, p_reps: Tensor, own: Tensor, taught: bool) -> Tensor | None:
        """``[B, M]`` bool, what is left out of each query's softmax; None without a mask.

        Args:
            q_reps, p_reps: the model's vectors, ``[B, D]`` and ``[M, D]``.
            own: ``[B]`` int64, each query's positive.
            taught: a teacher says what the passages of a query's own group are worth: these stay.
        """
        twins = None if self.keys is None else twin_mask(self.keys, own)
        return self._join(twins, self.guided or Guided(q_reps, p_reps), own, len(p_reps) // len(q_reps), taught)

    def pair_mask(self, reps: Tensor, p_reps: Tensor, own: Tensor) -> Tensor | None:
        """The same, ``[K, M]``, for queries ``reps`` ``[K, D]`` whose answers are the passages ``own`` ``[K]``."""
        twins = None if self.keys is None else pair_twin_mask(self.keys, own)
        return self._join(twins, Guided(reps, p_reps), own)

    def _join(
        self, twins: Tensor | None, vectors: Guided, own: Tensor, group_size: int = 1, taught: bool = False
    ) -> Tensor | None:
        if twins is not None:
            twins = without_group(twins, group_size) if taught else twins
            self._count("masked_twins", twins)
        if self.options.false_negative_margin is None:
            return twins
        margin, strategy = self.options.false_negative_margin, self.options.margin_strategy
        near = margin_mask(vectors.queries.detach(), vectors.passages.detach(), own, margin, strategy)
        near = without_group(near, group_size) if taught else near
        near = near if twins is None else near & ~twins
        self._count("masked_by_margin", near)
        return near if twins is None else near | twins

    def _count(self, name: str, mask: Tensor) -> None:
        self.found[name] = self.found.get(name, 0) + mask.sum()


def add_neg_q(
    terms: Terms, vectors: tuple[Tensor, Tensor, Tensor], owner: Tensor, false_negatives: FalseNegatives,
    options: ObjectiveArguments, temperature: float, widths: Widths | None = None,
) -> Terms:  # fmt: skip
    """``terms`` with what the negatives' own queries add: the penalty, or what ``options`` put in its place.

    Args:
        vectors: of queries ``[B, D]``, passages ``[M, D]`` and queries of negatives ``[K, D]``, K at least 1.
        owner: ``[K]`` int64, the passage that each of the latter belongs to.
        false_negatives: of the batch.
        options: the penalty's weight, and the control.
        temperature: of the contrastive loss.
        widths: that each of these is the mean over; None: whole vectors.
    """
    q_reps, p_reps, negative_reps = vectors
    if options.neg_q_as_rows:
        mask = false_negatives.pair_mask(negative_reps, p_reps, owner)  # [K, M]

        def rows(negative_queries: Tensor, passages: Tensor) -> Tensor:
            scores = dense_scores(negative_queries, passages, temperature)
            return pair_rows(scores if mask is None else scores.masked_fill(mask, -torch.inf), owner)

        pairs = mean_over_widths(widths, "pair_rows", rows, negative_reps, p_reps)
        terms = {**terms, **pairs, "loss": with_pair_rows(terms["loss"], len(q_reps), pairs["pair_rows"], len(owner))}
    if options.neg_q_control == "positive":
        pull = mean_over_widths(widths, "penalty", lambda q, p: positive_penalty(q, p, owner), q_reps, p_reps)
        # What was encoded takes part in the backward (with zeros), as the penalty has it.
        pull["penalty"] = pull["penalty"] + 0 * negative_reps.sum()
    elif options.neg_q_control == "unused" or options.penalty_weight > 0:
        pull = mean_over_widths(widths, "penalty", lambda p, n: clp_penalty(p, n, owner), p_reps, negative_reps)
    else:
        return terms
    if options.neg_q_control == "unused":
        return {**terms, **pull, "loss": unused(terms["loss"], pull["penalty"])}
    return {**add_penalty(terms, pull["penalty"], options.penalty_weight), **pull}
