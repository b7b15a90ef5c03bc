"""Knowledge distillation and self-distillation against loops."""

from __future__ import annotations

import pytest
import torch
from losses import reference
from losses.helpers import check, random

from FlagEmbedding.losses.contrastive import info_nce
from FlagEmbedding.losses.distillation import knowledge_distillation, self_distillation

pytestmark = pytest.mark.numeric

SHAPES = [(1, 1), (1, 4), (3, 1), (3, 4), (5, 2)]


def rows(scores: torch.Tensor) -> list[list[torch.Tensor]]:
    return [list(row) for row in scores]


@pytest.mark.parametrize(("batch", "group"), SHAPES[1:])
def test_knowledge_distillation(batch: int, group: int) -> None:
    targets = torch.softmax(random(batch, group, seed=2) * 2, dim=-1)
    check(
        lambda s: knowledge_distillation(s, targets, group),
        lambda s: reference.knowledge_distillation(rows(s), targets, group),
        random(batch, batch * group, seed=1) * 10,
    )


def test_a_teacher_sure_of_the_positive_is_the_contrastive_loss() -> None:
    scores = random(3, 12, seed=1)
    targets = torch.zeros(3, 4, dtype=torch.float64)
    targets[:, 0] = 1
    torch.testing.assert_close(knowledge_distillation(scores, targets, 4), info_nce(scores, 4), rtol=0, atol=1e-12)


def test_one_group_of_one_has_no_loss() -> None:
    assert knowledge_distillation(random(1, 1, seed=1), torch.ones(1, 1), 1).item() == 0


def test_earlier_items_of_the_group_get_no_gradient_from_later_terms() -> None:
    scores = random(2, 6, seed=1).requires_grad_()
    targets = torch.tensor([[0.0, 0.0, 1.0]] * 2, dtype=torch.float64)  # only the third term counts
    (gradient,) = torch.autograd.grad(knowledge_distillation(scores, targets, 3), scores)
    assert not gradient[0, :2].any() and not gradient[1, 3:5].any()
    assert (gradient[0, 2:].abs() > 1e-6).all() and (gradient[1, :3].abs() > 1e-6).all()


def test_large_scores_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = (random(2, 6, seed=1) * 100).to(dtype).requires_grad_()
        loss = knowledge_distillation(scores, torch.full((2, 3), 1 / 3), 3)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient.any()


def test_knowledge_distillation_gradient_by_finite_differences() -> None:
    targets = torch.softmax(random(2, 3, seed=2), dim=-1)
    scores = random(2, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: knowledge_distillation(s, targets, 3), scores)


@pytest.mark.parametrize(("batch", "group"), SHAPES[1:])
def test_self_distillation(batch: int, group: int) -> None:
    teacher = random(batch, batch * group, seed=2) * 3
    check(
        lambda s: self_distillation(s, teacher),
        lambda s: reference.self_distillation(rows(s), rows(teacher)),
        random(batch, batch * group, seed=1) * 3,
    )


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random(2, 4, seed=1).requires_grad_(), random(2, 4, seed=2).requires_grad_()
    loss = self_distillation(student, teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(loss, student)[0].abs().max() > 1e-3


def test_a_student_equal_to_its_teacher_has_the_teachers_entropy_and_no_gradient() -> None:
    scores = random(3, 6, seed=1).requires_grad_()
    loss = self_distillation(scores, scores)
    entropy = torch.distributions.Categorical(logits=scores.detach()).entropy().mean()
    torch.testing.assert_close(loss.detach(), entropy, rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-12
