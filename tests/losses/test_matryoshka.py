"""Losses at several widths: against sentence-transformers' MatryoshkaLoss, and plain torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.contrastive import dense_scores, info_nce
from FlagEmbedding.losses.distillation import knowledge_distillation, self_distillation
from FlagEmbedding.losses.matryoshka import MatryoshkaOptions, ScoresByWidth, Widths, mean_over_widths
from FlagEmbedding.losses.objective import retrieval_objective
from FlagEmbedding.losses.penalty import clp_penalty
from FlagEmbedding.utils.errors import UsageError

B, G, D, TAU = 3, 2, 12, 0.05
OPTIONS = MatryoshkaOptions([12, 6, 2], [1.0, 0.5, 3.0])


def raw(count: int, seed: int) -> Tensor:
    """Vectors as an encoder gives them before they are normalized."""
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def vectors(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(raw(count, seed).detach(), dim=-1).to(dtype)


def by_hand(loss, *parts: Tensor) -> Tensor:
    """Σ w L(normalize(x[:d])) / Σ w, spelled out."""
    total = 0.0
    for dim, weight in zip(OPTIONS.matryoshka_dims, OPTIONS.matryoshka_weights, strict=True):
        cut = [part[:, :dim] / part[:, :dim].square().sum(-1, keepdim=True).sqrt() for part in parts]
        total = total + weight * loss(*cut)
    return total / 4.5


def nce(q: Tensor, p: Tensor) -> Tensor:
    scores = q @ p.T / TAU
    return (scores.logsumexp(-1) - scores[torch.arange(B), torch.arange(B) * G]).mean()


def test_contrastive_loss_and_penalty_in_float64() -> None:
    leaves = [raw(B, 1), raw(B * G, 2), raw(4, 3)]
    q, p, n = (F.normalize(each, dim=-1) for each in leaves)
    owner = torch.tensor([1, 3, 3, 5])
    widths = Widths.of(OPTIONS, normalize=True)
    assert widths is not None
    terms = retrieval_objective(
        dense_scores(q, p, TAU), group_size=G, by_width=ScoresByWidth(widths, widths.scores(q, p, TAU))
    )
    terms |= mean_over_widths(widths, "penalty", lambda a, b: clp_penalty(a, b, owner), p, n)
    expected = by_hand(nce, q, p)
    shares = torch.tensor([1.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    expected_penalty = by_hand(lambda a, b: (shares * (1 - (a[owner] * b).sum(-1))).sum() / 3, p, n)
    torch.testing.assert_close(terms["loss"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["penalty"], expected_penalty, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(terms["loss"] + terms["penalty"], leaves, retain_graph=True)
    theirs = torch.autograd.grad(expected + expected_penalty, leaves)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert {name for name in terms if name[-1].isdigit()} == {
        f"{name}_{dim}" for name in ("contrastive_loss", "penalty") for dim in (12, 6, 2)
    }
    torch.testing.assert_close(terms["contrastive_loss_12"], nce(q, p), rtol=0, atol=1e-12)


def test_plain_contrastive_loss_is_sentence_transformers() -> None:
    """Their sum over widths, undivided, from the same vectors."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    q, p = vectors(B, 1, torch.float32), vectors(B, 2, torch.float32)

    class Given(torch.nn.Module):
        def get_embedding_dimension(self) -> int:
            return D

        get_sentence_embedding_dimension = get_embedding_dimension

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": features["given"]}

    model = Given()
    inner = losses.MultipleNegativesRankingLoss(model, scale=1 / TAU)
    reference = losses.MatryoshkaLoss(model, inner, OPTIONS.matryoshka_dims, OPTIONS.matryoshka_weights)
    expected = reference([{"given": q}, {"given": p}], None) / 4.5
    widths = Widths.of(OPTIONS, normalize=True)
    assert widths is not None
    loss = widths.mean("loss", [info_nce(scores, 1) for scores in widths.scores(q, p, TAU)])["loss"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=2e-6)


def test_distillation_and_unified_parts() -> None:
    """The dense parts alone are means over widths; sparse, colbert and ensemble are not."""
    q, p = vectors(B, 1), vectors(B * G, 2)
    widths = Widths.of(OPTIONS, normalize=True)
    assert widths is not None
    dense, sparse, colbert = dense_scores(q, p, TAU), dense_scores(q, p, 1.0), dense_scores(q, p, 0.2)
    targets = torch.softmax(torch.randn(B, G, generator=torch.Generator().manual_seed(4), dtype=torch.float64), -1)
    given = {"group_size": G, "teacher_targets": targets, "self_distill": True}
    scores = ScoresByWidth(widths, widths.scores(q, p, TAU))
    whole = retrieval_objective(dense, sparse, colbert, **given)
    terms = retrieval_objective(dense, sparse, colbert, by_width=scores, **given)
    ensemble = dense + 0.3 * sparse + colbert
    distillation = by_hand(lambda a, b: knowledge_distillation(a @ b.T / TAU, targets, G), q, p)
    of_itself = by_hand(lambda a, b: self_distillation(a @ b.T / TAU, ensemble), q, p)
    torch.testing.assert_close(terms["distillation"], distillation, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["self_dense"], of_itself, rtol=0, atol=1e-12)
    for name in ("sparse", "colbert", "ensemble", "self_sparse", "self_colbert"):
        assert terms[name] == whole[name]
    moved = (distillation - whole["distillation"]) / 8 + (of_itself - whole["self_dense"]) / 6
    torch.testing.assert_close(terms["loss"], whole["loss"] + moved, rtol=0, atol=1e-12)


def test_the_full_width_alone_is_the_plain_loss_to_the_bit() -> None:
    q, p = vectors(B, 1, torch.float32), vectors(B * G, 2, torch.float32)
    widths = Widths.of(MatryoshkaOptions([D]), normalize=True)
    assert widths is not None
    dense = dense_scores(q, p, TAU)
    by_width = ScoresByWidth(widths, widths.scores(q, p, TAU))
    assert retrieval_objective(dense, group_size=G, by_width=by_width)["loss"] == info_nce(dense, G)
    assert Widths.of(MatryoshkaOptions(), normalize=True) is None


def test_vectors_that_are_not_normalized_stay_so() -> None:
    widths = Widths.of(MatryoshkaOptions([8, 4]), normalize=False)
    assert widths is not None
    q = 3 * vectors(B, 1)
    assert torch.equal(widths.cut(q)[1], q[:, :4])


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ([8, 0], [], "widths are 1 or more"),
        ([8, 8], [], "each width once"),
        ([4, 8], [], "widest to the narrowest"),
        ([8, 4], [1.0], "expected 2 numbers"),
        ([8, 4], [1.0, 0.0], "above 0"),
        ([8, 4], [1.0, float("nan")], "above 0"),
        ([], [1.0], "no effect without --matryoshka_dims"),
        ([64, 4], [], "have 32 dimensions"),
    ],
)
def test_widths_that_cannot_be(dims: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MatryoshkaOptions(dims, weights).check_widths(32)
