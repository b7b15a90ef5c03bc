"""Scores and InfoNCE against loops; the sparse score against the vocabulary-wide formulation it replaces."""

from __future__ import annotations

import math

import pytest
import torch
from losses import reference
from losses.helpers import as_matrix, check, random, unit

from FlagEmbedding.losses import contrastive
from FlagEmbedding.losses.contrastive import colbert_scores, dense_scores, info_nce, sparse_scores

pytestmark = pytest.mark.numeric

TAU = 0.05
SHAPES = [(1, 1, 4), (1, 5, 8), (3, 2, 16), (4, 3, 5)]  # B, G, D


@pytest.mark.parametrize(("batch", "group", "width"), SHAPES)
def test_dense_scores(batch: int, group: int, width: int) -> None:
    check(
        lambda q, p: dense_scores(q, p, TAU),
        lambda q, p: as_matrix(reference.dense(q, p, TAU)),
        unit(batch, width, seed=1),
        unit(batch * group, width, seed=2),
    )


@pytest.mark.parametrize(("batch", "group"), [(1, 2), (1, 8), (3, 1), (3, 4), (5, 2)])
def test_info_nce(batch: int, group: int) -> None:
    check(
        lambda s: info_nce(s, group),
        lambda s: reference.info_nce([list(row) for row in s], group),
        random(batch, batch * group, seed=3) * 10,
    )


def test_info_nce_by_hand() -> None:
    # Two queries of two passages; each score 0 but the second query's positive, column 2, at log 3.
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.log(3), 0.0]], dtype=torch.float64)
    assert info_nce(scores, 2).item() == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-12)
    assert info_nce(scores[:1, :1], 1).item() == 0.0


def test_info_nce_gradient_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda s: info_nce(s, 2), random(3, 6, seed=4).requires_grad_())


# --- sparse ------------------------------------------------------------------------------------------------------

SKIP = [0, 1, 2, 3]
VOCABULARY = 9


def sparse_side(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows <s> … </s> over few tokens, so that many repeat.

    Weights are still to go through a relu, as in the encoder: at an exact 0 the maximum is tied with "absent", and
    only the relu makes the gradient there one and the same.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sum(lengths),), generator=generator)
    place = 0
    for length in lengths:
        ids[place], ids[place + length - 1] = 0, 2
        place += length
    return ids, torch.randn(sum(lengths), dtype=torch.float64, generator=generator) + 0.7


@pytest.mark.parametrize(
    ("q_lengths", "p_lengths"),
    [([5], [7]), ([6], [4, 12, 9]), ([8, 3, 11], [20, 2, 16, 9, 30, 5]), ([2, 9], [12, 2])],
)
def test_sparse_scores(q_lengths: list[int], p_lengths: list[int]) -> None:
    (q_ids, q_weights), (p_ids, p_weights) = sparse_side(q_lengths, 1), sparse_side(p_lengths, 2)

    def ours(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return sparse_scores(q_ids, q.relu(), q_lengths, p_ids, p.relu(), p_lengths, SKIP, TAU)

    def loops(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        q_rows = reference.token_rows(q_ids, q.relu(), q_lengths, SKIP)
        p_rows = reference.token_rows(p_ids, p.relu(), p_lengths, SKIP)
        return as_matrix(reference.sparse(q_rows, p_rows, TAU))

    def over_the_vocabulary(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        wide_q = reference.sparse_over_the_vocabulary(q_ids, q.relu(), q_lengths, SKIP, VOCABULARY)
        wide_p = reference.sparse_over_the_vocabulary(p_ids, p.relu(), p_lengths, SKIP, VOCABULARY)
        return wide_q @ wide_p.T / TAU

    check(ours, loops, q_weights, p_weights)
    check(ours, over_the_vocabulary, q_weights, p_weights)


def test_sparse_scores_by_hand() -> None:
    # The query holds 7 twice (0.5 and 2) and 9; the passage 7 twice (3 and 1) and 8. Only 7 is shared: 2 · 3 / 0.5.
    score = sparse_scores(
        torch.tensor([0, 7, 9, 7, 2]), torch.tensor([9.0, 0.5, 4.0, 2.0, 9.0]), [5],
        torch.tensor([0, 7, 8, 7, 2]), torch.tensor([9.0, 3.0, 4.0, 1.0, 9.0]), [5], SKIP, 0.5,
    )  # fmt: skip
    assert score.tolist() == [[12.0]]


def test_sparse_scores_without_any_common_token() -> None:
    q_weights = torch.ones(3, requires_grad=True)
    p_weights = torch.ones(3, requires_grad=True)
    for middle in (7, 3):  # a word the passage lacks, and an unknown word: no column is left at all
        scores = sparse_scores(
            torch.tensor([0, middle, 2]), q_weights, [3], torch.tensor([0, 8, 2]), p_weights, [3], SKIP, TAU
        )
        assert scores.tolist() == [[0.0]]
        gradients = torch.autograd.grad(scores.sum(), (q_weights, p_weights))
        assert all(not g.any() for g in gradients)


def test_sparse_scores_do_not_grow_with_the_vocabulary() -> None:
    # Token ids of a vocabulary so large that one row over it would be 8 TB.
    ids = torch.tensor([5, 10**12, 7, 5, 10**12])
    scores = sparse_scores(ids[:3], torch.ones(3), [3], ids[3:], torch.ones(2), [2], [], 1.0)
    assert scores.tolist() == [[2.0]]


# --- colbert -----------------------------------------------------------------------------------------------------


def padded(lengths: list[int], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    return unit(len(lengths), max(lengths), width, seed=seed) * mask[..., None], mask


@pytest.mark.parametrize(
    ("q_lengths", "p_lengths", "width"),
    [([3], [4], 5), ([1], [2, 6, 1], 8), ([4, 2, 5], [6, 3, 6, 1, 2, 4], 3), ([2, 2], [3, 3], 2)],
)
@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_colbert_scores(
    q_lengths: list[int], p_lengths: list[int], width: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "_COLBERT_CHUNK", chunk)  # a constant: one passage at a time, then all at once
    (q, q_mask), (p, p_mask) = padded(q_lengths, width, 1), padded(p_lengths, width, 2)

    def loops(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        q_rows = [row[:n] for row, n in zip(q, q_lengths, strict=True)]
        p_rows = [row[:n] for row, n in zip(p, p_lengths, strict=True)]
        return as_matrix(reference.colbert(q_rows, p_rows, max(p_lengths), TAU))

    # As in the encoder, what stands at padding is multiplied by the mask; its gradient is then none.
    check(lambda q, p: colbert_scores(q * q_mask[..., None], q_mask, p * p_mask[..., None], TAU), loops, q, p)


def test_padded_passage_tokens_count_as_zero() -> None:
    q = torch.tensor([[[1.0, 0.0]]])
    passages = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [-0.6, 0.8]]])  # the first is padded
    assert colbert_scores(q, torch.ones(1, 1), passages, 0.5).tolist() == [[0.0, pytest.approx(-1.2)]]


def test_padded_query_tokens_add_nothing() -> None:
    q, p = unit(1, 3, 4, seed=1), unit(2, 5, 4, seed=2)
    longer = torch.cat([q, torch.zeros(1, 6, 4, dtype=q.dtype)], dim=1)
    mask = torch.cat([torch.ones(1, 3), torch.zeros(1, 6)], dim=1)
    torch.testing.assert_close(colbert_scores(longer, mask, p, TAU), colbert_scores(q, torch.ones(1, 3), p, TAU))
    nothing = colbert_scores(longer * 0, mask * 0, p, TAU)
    assert nothing.tolist() == [[0.0, 0.0]]  # a query without tokens, not 0 / 0


def test_colbert_keeps_only_indices_for_the_backward() -> None:
    q = unit(2, 16, 8, seed=1).float().requires_grad_()
    p = unit(6, 64, 8, seed=2).float().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        colbert_scores(q, torch.ones(2, 16), p, TAU)
    assert max(kept) < 2 * 16 * 6 * 64  # the similarity tensor is not among them
