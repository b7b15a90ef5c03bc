"""The contrastive learning penalty against loops: any batch, missing queries, several queries a negative."""

from __future__ import annotations

import pytest
import torch
from losses import reference
from losses.helpers import check, random, unit

from FlagEmbedding.losses.penalty import apply_penalty, clp_penalty

# Passages M, the owner of each query, what the case is about.
CASES = [
    (2, [1], "one query, one negative"),
    (5, [1, 2, 3, 4], "batch 1, every negative has one"),
    (9, [1, 2, 4, 5, 7, 8], "batch 3, every negative has one"),
    (9, [1, 5, 8], "some negatives have none"),
    (9, [1, 1, 1, 5, 7, 7], "several queries a negative"),
    (9, [7, 1, 5, 1, 7, 1], "in any order"),
]


@pytest.mark.parametrize(("rows", "owner", "name"), CASES, ids=[case[2] for case in CASES])
@pytest.mark.parametrize("normalized", [True, False])
def test_penalty(rows: int, owner: list[int], name: str, normalized: bool) -> None:
    make = unit if normalized else (lambda *shape, seed: random(*shape, seed=seed) * 3)
    check(
        lambda p, q: clp_penalty(p, q, torch.tensor(owner)),
        lambda p, q: reference.penalty(p, q, owner),
        make(rows, 6, seed=1),
        make(len(owner), 6, seed=2),
    )


def test_penalty_by_hand() -> None:
    passages = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    queries = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
    # Negative 1 answers queries 0 (cosine 1) and 1 (cosine 0): 0.5. Negative 2 answers query 2 (cosine −1): 2.
    assert clp_penalty(passages, queries, torch.tensor([1, 1, 2])).item() == pytest.approx(1.25, abs=1e-12)


def test_no_query_at_all_is_zero_and_has_a_gradient() -> None:
    passages = torch.ones(4, 3, requires_grad=True)
    queries = torch.ones(0, 3, requires_grad=True)
    penalty = clp_penalty(passages, queries, torch.zeros(0, dtype=torch.long))
    gradients = torch.autograd.grad(penalty, (passages, queries))
    assert penalty.item() == 0 and not gradients[0].any() and gradients[1].shape == (0, 3)


def test_gradient_reaches_both_sides_and_only_the_pairs() -> None:
    passages, queries = unit(6, 4, seed=1).requires_grad_(), unit(2, 4, seed=2).requires_grad_()
    gradient_p, gradient_q = torch.autograd.grad(
        clp_penalty(passages, queries, torch.tensor([1, 4])), (passages, queries)
    )
    assert (gradient_p.abs().sum(dim=1) > 1e-3).tolist() == [False, True, False, False, True, False]
    assert (gradient_q.abs().sum(dim=1) > 1e-3).all()


def test_gradient_by_finite_differences() -> None:
    owner = torch.tensor([1, 1, 3])
    inputs = random(5, 3, seed=1).requires_grad_(), random(3, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: clp_penalty(p, q, owner), inputs)


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_apply_penalty(weight: float) -> None:
    check(
        lambda loss, penalty: apply_penalty(loss, penalty, weight),
        lambda loss, penalty: loss - weight * loss + weight * penalty,
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64),
    )


def test_penalty_is_computed_in_full_precision() -> None:
    passages, queries = unit(3, 64, seed=1), unit(2, 64, seed=2)
    owner = torch.tensor([1, 2])
    exact = clp_penalty(passages, queries, owner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = clp_penalty(passages.float(), queries.float(), owner)
    assert under.dtype == torch.float32 and under.item() == pytest.approx(exact.item(), abs=1e-6)
