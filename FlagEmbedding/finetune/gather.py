"""The batches of all processes as one batch, for ``--negatives_cross_device``.

One collective for all sizes, then one for each kind of number that travels: integers, dense vectors, and for unified
fine-tuning token weights and colbert vectors. Which of them run depends on the options alone, never on what a process's
rows hold, so that no process waits for a collective that another has no reason for. Ragged parts travel end to end with
their lengths. Other processes' rows are constants; ``all_gather_rows`` scales the own slice's gradient so that DDP's
mean is the one-process gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import all_gather_rows, gather_counts
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.hardware import send


@dataclass(frozen=True)
class Gathered:
    """What the objective reads: a batch of one process, or of all.

    Attributes:
        queries, passages: B and B·G sequences.
        negative_reps: ``[K, D]``, vectors of the negatives' queries; None without the penalty.
        owner: ``[K]`` int64, the passage that each belongs to; None without the penalty.
        teacher_scores: ``[B, G]`` or None.
    """

    queries: Representations
    passages: Representations
    negative_reps: Tensor | None
    owner: Tensor | None
    teacher_scores: Tensor | None


def gather_batch(own: Gathered, with_penalty: bool) -> Gathered:
    """Every process's batch in rank order. ``padded_length`` becomes the longest of all, as one batch would pad.

    Raises:
        UserError: some processes' rows have teacher scores and others' have none.
    """
    roles = (own.queries, own.passages)
    dense = [_present(role.dense) for role in roles]
    unified = own.queries.token_weights is not None
    negatives = dense[1][:0] if own.negative_reps is None else own.negative_reps
    vectors = [*dense, *([negatives] if with_penalty else [])]
    counts = [len(dense[0]), len(dense[1]), len(negatives), int(own.teacher_scores is not None)]
    counts += [*(len(role.tokens.ids) for role in roles), *(role.tokens.padded_length for role in roles)]
    every = gather_counts(counts, dense[0].device)
    if len({sizes[3] for sizes in every}) > 1:
        raise UserError(
            "the rows of some processes have pos_scores and neg_scores and those of others have none: give all rows "
            "teacher scores, or leave out --knowledge_distillation"
        )
    found = _gather(vectors, [sizes[: len(vectors)] for sizes in every])
    negative_reps, owner = (found[2] if with_penalty else None), own.owner
    if with_penalty:
        owner = dense[1].new_empty(0, dtype=torch.int64) if owner is None else owner
        before = [0, *accumulate(sizes[1] for sizes in every)]
        parts = _pieces(_gather([owner], [sizes[2:3] for sizes in every])[0], [sizes[2] for sizes in every])
        owner = torch.cat([part + first for part, first in zip(parts, before, strict=False)])
    teacher = own.teacher_scores
    if teacher is not None:
        (teacher,) = _gather([teacher], [sizes[:1] for sizes in every])
    results = [Representations(replace(role.tokens, ids=role.tokens.ids[:0], lengths=[]), part)
               for role, part in zip(roles, found, strict=False)]  # fmt: skip
    if unified:
        results = _gather_ragged(roles, found, every)
    return Gathered(results[0], results[1], negative_reps, owner, teacher)


def _gather_ragged(
    roles: Sequence[Representations], dense: Sequence[Tensor], every: Sequence[Sequence[int]]
) -> list[Representations]:
    """The roles with their tokens, token weights and colbert vectors."""
    device = dense[0].device
    numbers = [part for role in roles for part in (*send([role.tokens.lengths], device), role.tokens.ids)]
    sizes = [[each[0], each[4], each[1], each[5]] for each in every]
    integers = _gather(numbers, sizes)
    weights = _gather([_present(role.token_weights) for role in roles], [each[4:6] for each in every])
    later = [[each[4] - each[0], each[5] - each[1]] for each in every]
    colbert = _gather([_present(role.colbert) for role in roles], later)
    return [
        Representations(
            TokenBatch(integers[2 * i + 1], integers[2 * i].tolist(), max(each[6 + i] for each in every)),
            dense[i],
            weights[i],
            colbert[i],
        )
        for i in range(len(roles))
    ]


def _gather(parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each part of all processes, end to end in rank order, by one collective.

    Args:
        parts: of this process, of one dtype and width.
        sizes: for every process the lengths of its parts.
    """
    together = all_gather_rows(torch.cat(list(parts)), [sum(own) for own in sizes])
    pieces = iter(_pieces(together, [length for own in sizes for length in own]))
    by_rank: list[list[Tensor]] = [list(_take(pieces, len(own))) for own in sizes]
    return [torch.cat(part) for part in zip(*by_rank, strict=True)]


def _take(pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield next(pieces)


def _pieces(tensor: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    return tensor.split(list(lengths))  # type: ignore[no-any-return, no-untyped-call]


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
