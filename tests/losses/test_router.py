"""Load balance, z-loss and statistics against loops and against the values their papers name."""

from __future__ import annotations

import math

import pytest
import torch
from losses import reference
from losses.helpers import check, random

from FlagEmbedding.losses.router import load_balance_loss, routing_statistics, z_loss

pytestmark = pytest.mark.numeric

SHAPES = [(1, 2, 1), (7, 2, 1), (12, 4, 2), (9, 3, 3)]  # T, E, K


def routing(tokens: int, experts: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = random(tokens, experts, seed=tokens) * 2
    return logits, logits.topk(chosen, dim=-1).indices


@pytest.mark.parametrize("shape", SHAPES)
def test_load_balance(shape: tuple[int, int, int]) -> None:
    logits, experts = routing(*shape)
    if shape[0] == 1 or shape[1] == shape[2]:
        # One token, or all experts chosen, still has a value; the gradient may vanish.
        torch.testing.assert_close(
            load_balance_loss(logits, experts), reference.load_balance(logits, experts), rtol=0, atol=1e-9
        )
        return
    check(lambda x: load_balance_loss(x, experts), lambda x: reference.load_balance(x, experts), logits)


def test_load_balance_at_its_ends() -> None:
    even = torch.zeros(8, 4, dtype=torch.float64)
    assert load_balance_loss(even, torch.arange(8)[:, None] % 4).item() == pytest.approx(1, abs=1e-12)
    one = torch.full((8, 4), -50.0, dtype=torch.float64)
    one[:, 2] = 50
    assert load_balance_loss(one, torch.full((8, 1), 2)).item() == pytest.approx(4, abs=1e-12)


def test_load_balance_pushes_down_the_crowded_expert() -> None:
    logits = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0]] * 7 + [[1]])
    (gradient,) = torch.autograd.grad(load_balance_loss(logits, experts), logits)
    assert (gradient[:, 0] > 1e-3).all() and (gradient[:, 1] < -1e-3).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_z_loss(shape: tuple[int, int, int]) -> None:
    check(z_loss, reference.z, routing(*shape)[0])


def test_z_loss_by_hand_and_for_large_logits() -> None:
    assert z_loss(torch.zeros(5, 2, dtype=torch.float64)).item() == pytest.approx(math.log(2) ** 2, abs=1e-12)
    assert z_loss(torch.full((2, 2), 1000.0)).item() == pytest.approx((1000 + math.log(2)) ** 2, rel=1e-6)


def test_gradients_by_finite_differences() -> None:
    logits, experts = routing(6, 3, 2)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(x, experts), logits)
    assert torch.autograd.gradcheck(z_loss, logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: tuple[int, int, int]) -> None:
    logits, experts = routing(*shape)
    counts, entropy = routing_statistics(logits.requires_grad_(), experts)
    flat = experts.flatten().tolist()
    assert counts.tolist() == [flat.count(e) for e in range(shape[1])]
    assert entropy.item() == pytest.approx(reference.entropy(logits.detach()), abs=1e-9)
    assert not entropy.requires_grad


def test_entropy_at_its_ends() -> None:
    assert routing_statistics(torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long)).entropy == pytest.approx(
        math.log(4)
    )
    sure = torch.tensor([[200.0, 0.0]])
    assert routing_statistics(sure, torch.zeros(1, 1, dtype=torch.long)).entropy == 0


def test_no_tokens() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    experts = torch.zeros(0, 1, dtype=torch.long)
    for loss in (load_balance_loss(logits, experts), z_loss(logits)):
        assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].shape == (0, 3)
    counts, entropy = routing_statistics(logits, experts)
    assert counts.tolist() == [0, 0, 0] and entropy.item() == 0
