"""The weighted sums against loops, and the refusal of scores that do not belong together."""

from __future__ import annotations

import itertools

import pytest
import torch
from losses import reference
from losses.helpers import check, random

from FlagEmbedding.losses.objective import ObjectiveArguments, add_penalty, add_router_losses, retrieval_objective

pytestmark = pytest.mark.numeric

SHAPES = [(1, 2), (1, 5), (2, 3), (4, 2)]


def rows(scores: torch.Tensor) -> list[list[torch.Tensor]]:
    return [list(row) for row in scores]


@pytest.mark.parametrize(
    ("shape", "teacher", "self_distill"), list(itertools.product(SHAPES, [False, True], [False, True]))
)
def test_unified(shape: tuple[int, int], teacher: bool, self_distill: bool) -> None:
    batch, group = shape
    targets = torch.softmax(random(batch, group, seed=9), dim=-1) if teacher else None
    check(
        lambda d, s, c: retrieval_objective(
            d, s, c, group_size=group, teacher_targets=targets, self_distill=self_distill
        )["loss"],
        lambda d, s, c: reference.objective(rows(d), rows(s), rows(c), group, targets, self_distill),
        *(random(batch, batch * group, seed=seed) * 5 for seed in (1, 2, 3)),
    )


@pytest.mark.parametrize(("shape", "teacher"), list(itertools.product(SHAPES, [False, True])))
def test_dense_alone(shape: tuple[int, int], teacher: bool) -> None:
    batch, group = shape
    targets = torch.softmax(random(batch, group, seed=9), dim=-1) if teacher else None
    check(
        lambda d: retrieval_objective(d, group_size=group, teacher_targets=targets, self_distill=True)["loss"],
        lambda d: reference.objective(rows(d), None, None, group, targets, True),
        random(batch, batch * group, seed=1) * 5,
    )


def test_terms_are_named_and_add_up() -> None:
    d, s, c = (random(2, 6, seed=seed) for seed in (1, 2, 3))
    assert set(retrieval_objective(d, group_size=3)) == {"contrastive_loss", "loss"}
    assert "distillation" in retrieval_objective(d, group_size=3, teacher_targets=torch.full((2, 3), 1 / 3))
    terms = retrieval_objective(d, s, c, group_size=3, self_distill=True)
    unified = (terms["contrastive_loss"] + terms["ensemble"] + 0.1 * terms["sparse"] + terms["colbert"]) / 4
    soft = (terms["self_dense"] + 0.1 * terms["self_sparse"] + terms["self_colbert"]) / 3
    torch.testing.assert_close(terms["loss"], (unified + soft) / 2, rtol=0, atol=1e-12)


def test_the_penalty_takes_its_share_of_the_loss() -> None:
    terms = {"contrastive_loss": torch.tensor(2.0), "loss": torch.tensor(2.0)}
    found = add_penalty(terms, torch.tensor(0.5), 0.25)
    assert {name: float(value) for name, value in found.items()} == {
        "contrastive_loss": 2.0, "penalty": 0.5, "loss": 0.75 * 2.0 + 0.25 * 0.5,
    }  # fmt: skip
    assert set(terms) == {"contrastive_loss", "loss"} and terms["loss"] == 2.0, "what was given stays"


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
def test_router_losses_are_means_over_layers_and_count_where_weighted(balance: float, z: float) -> None:
    layers = [(random(t, 3, seed=t), random(t, 3, seed=t).topk(2, dim=-1).indices) for t in (4, 7)]
    options = ObjectiveArguments(router_aux_loss_coef=balance, router_z_loss_coef=z)
    assert options.has_router_loss == (balance > 0 or z > 0)
    found = add_router_losses({"loss": torch.tensor(1.0, dtype=torch.float64)}, layers, options)
    expected = {
        "router_aux_loss": sum(reference.load_balance(*layer) for layer in layers) / 2,
        "router_z_loss": sum(reference.z(logits) for logits, _ in layers) / 2,
    }
    total = 1.0
    for name, weight in (("router_aux_loss", balance), ("router_z_loss", z)):
        assert float(found[name]) == pytest.approx(float(expected[name]), abs=1e-9)
        assert (f"{name}_scaled" in found) == (weight > 0)
        if weight:
            assert float(found[f"{name}_scaled"]) == pytest.approx(weight * float(expected[name]), abs=1e-9)
            total += weight * float(expected[name])
    assert float(found["loss"]) == pytest.approx(total, abs=1e-9)
    between_logs = add_router_losses({"loss": torch.tensor(1.0, dtype=torch.float64)}, layers, options, False)
    scaled = {name for name in found if f"{name.removesuffix('_scaled')}_scaled" in found}
    assert between_logs.keys() == {"loss"} | scaled
    assert between_logs["loss"] == found["loss"]


@pytest.mark.parametrize(
    ("columns", "sparse_columns", "colbert", "targets", "message"),
    [
        (5, None, False, None, "2 queries of 3 passages need 6 score columns, got 5"),
        (6, 6, False, None, "sparse and colbert together"),
        (6, 5, True, None, "sparse scores of shape"),
        (6, None, False, (2, 4), "teacher targets need shape"),
    ],
)
def test_what_does_not_belong_together_is_refused(columns, sparse_columns, colbert, targets, message) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_objective(
            torch.zeros(2, columns),
            None if sparse_columns is None else torch.zeros(2, sparse_columns),
            torch.zeros(2, 6) if colbert else None,
            group_size=3,
            teacher_targets=None if targets is None else torch.zeros(targets),
        )
