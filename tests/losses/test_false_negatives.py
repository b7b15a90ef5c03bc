"""Masks of false negatives against loops and against sentence-transformers' GISTEmbedLoss; controls of the penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from losses import reference
from losses.helpers import check, random, unit
from torch import Tensor

from FlagEmbedding.losses.controls import pair_rows, permute_owners, positive_penalty, unused, with_pair_rows
from FlagEmbedding.losses.distillation import group_kl
from FlagEmbedding.losses.false_negatives import TextKeys, margin_mask, pair_twin_mask, twin_mask, without_group
from FlagEmbedding.losses.objective import ObjectiveArguments, retrieval_objective
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

GROUP = 3
# Query 0 has two positives, one of which is query 1's negative; query 2 is query 1 again, with another positive.
QUERIES = ["a", "b", "b"]
POSITIVES = [["p0", "p0'"], ["p1"], ["p2"]]
PASSAGES = ["p0", "n0", "p1", "p1", "p0'", "n1", "p2", "p0", "n2"]
MASKED = {(0, 4), (0, 7), (1, 2), (1, 6), (2, 2), (2, 3)}


def numbers(texts: list[str]) -> Tensor:
    return torch.tensor([sum(ord(c) << 8 * i for i, c in enumerate(text)) for text in texts])


def keys() -> TextKeys:
    row = [i for i, texts in enumerate(POSITIVES) for _ in texts]
    positives = [text for texts in POSITIVES for text in texts]
    return TextKeys(*map(numbers, (QUERIES, PASSAGES, positives)), torch.tensor(row))


def own(queries: int, group: int = GROUP) -> Tensor:
    return torch.arange(queries) * group


def pairs(mask: Tensor) -> set[tuple[int, int]]:
    return {(i, m) for i, m in mask.nonzero().tolist()}


def test_twins_by_hand() -> None:
    assert pairs(twin_mask(keys(), own(3))) == MASKED
    assert pairs(without_group(twin_mask(keys(), own(3)), GROUP)) == MASKED - {(0, 2)}
    # Passage 1 answers a query of its own, and nothing has its text; passage 4 stands for a text that is there once.
    assert pairs(pair_twin_mask(keys(), torch.tensor([7, 3]))) == {(0, 0), (1, 2)}


@pytest.mark.parametrize("margin", [-0.4, 0.0, 0.2])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_margins_are_those_of_gist(strategy: Any, margin: float) -> None:
    """The loss of a batch against sentence-transformers', whose guide and model give these vectors."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    model = [unit(6, 8, seed=seed).requires_grad_() for seed in (1, 2, 3)]  # anchors, positives, negatives
    guide = [unit(6, 5, seed=seed) for seed in (4, 5, 6)]
    gist = GISTEmbedLoss.__new__(GISTEmbedLoss)
    torch.nn.Module.__init__(gist)

    class Vectors(torch.nn.Module):
        def __init__(self, columns: list[Tensor]) -> None:
            super().__init__()
            self.columns = columns

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": self.columns[features["column"]]}

    gist.model, gist.guide, gist.must_retokenize = Vectors(model), Vectors(guide), False
    gist.temperature, gist.margin_strategy, gist.margin = 0.1, strategy, margin
    gist.similarity_fct, gist.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    gist.contrast_anchors = gist.contrast_positives = gist.gather_across_devices = False
    expected = gist([{"column": column} for column in range(3)], torch.empty(0))
    expected_gradients = torch.autograd.grad(expected, model)

    passages, guided = (torch.stack(side[1:], dim=1).flatten(0, 1) for side in (model, guide))  # positive, negative
    mask = margin_mask(guide[0], guided, own(6, 2), margin, strategy)
    assert mask.any() and not mask.all()
    queries, passages = (torch.nn.functional.normalize(each, dim=-1) for each in (model[0], passages))
    loss = retrieval_objective(queries @ passages.T / 0.1, group_size=2, mask=mask)["loss"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, model), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("teacher", [False, True])
def test_masked_passages_are_not_there(teacher: bool) -> None:
    """Loops over what is left of each row; unified, so that one mask serves all three and their sum."""
    mask = twin_mask(keys(), own(3))
    targets = torch.softmax(random(3, GROUP, seed=9), dim=-1) if teacher else None
    mask = without_group(mask, GROUP) if teacher else mask

    def loops(*parts: Tensor) -> Tensor:
        def info_nce(scores: Tensor) -> Tensor:
            total = reference.zero()
            for i in range(3):
                for j in range(GROUP) if teacher else [0]:
                    before = set(range(i * GROUP, i * GROUP + j))
                    left = [m for m in range(9) if not mask[i, m] and m not in before]
                    log_p = scores[i, i * GROUP + j] - torch.logsumexp(scores[i, left], dim=0)
                    total = total - (1.0 if targets is None else targets[i, j]) * log_p / 3
            return total

        d, s, c = map(info_nce, parts)
        return (d + info_nce(parts[0] + 0.3 * parts[1] + parts[2]) + 0.1 * s + c) / 4

    check(
        lambda d, s, c: retrieval_objective(d, s, c, group_size=GROUP, teacher_targets=targets, mask=mask)["loss"],
        loops,
        *(random(3, 9, seed=seed) * 3 for seed in (1, 2, 3)),
    )


def test_a_query_all_of_whose_negatives_are_masked_has_no_loss() -> None:
    scores = random(2, 4, seed=1).requires_grad_()
    mask = torch.tensor([[False, True, True, True], [False] * 4])
    loss = retrieval_objective(scores, group_size=2, mask=mask)["loss"]
    (gradient,) = torch.autograd.grad(loss, scores)
    assert not gradient[0].any() and gradient[1].abs().min() > 1e-3
    assert loss.item() == pytest.approx(-torch.log_softmax(scores[1], 0)[2].item() / 2, abs=1e-12)


def test_group_kl() -> None:
    targets = torch.softmax(random(3, 4, seed=2) * 2, dim=-1)

    def loops(scores: Tensor) -> Tensor:
        total = reference.zero()
        for i in range(3):
            group = [scores[i, i * 4 + j] for j in range(4)]
            norm = torch.log(sum((torch.exp(s) for s in group), reference.zero()))
            for j, score in enumerate(group):
                total = total + targets[i, j] * (torch.log(targets[i, j]) - (score - norm)) / 3
        return total

    check(lambda s: group_kl(s, targets, 4), loops, random(3, 12, seed=1) * 3)
    sure = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert group_kl(torch.tensor([[math.log(3), 0.0]]).double(), sure, 2).item() == pytest.approx(math.log(4 / 3))
    terms = retrieval_objective(random(3, 12, seed=1), group_size=4, teacher_targets=targets, distill_loss="kl")
    assert terms["distillation"].equal(group_kl(random(3, 12, seed=1), targets, 4))


# --- controls ----------------------------------------------------------------------------------------------------


def test_the_ring_moves_every_passages_queries_together() -> None:
    owners = [1, 1, 2, 5, 5, 5, 8]
    found = permute_owners(owners, "7/rows")
    assert found == permute_owners(owners, "7/rows") and sorted(set(found)) == [1, 2, 5, 8]
    moved = dict(zip(owners, found, strict=True))
    assert [moved[owner] for owner in owners] == found, "one passage, one way"
    assert all(owner != there for owner, there in moved.items())
    assert len({tuple(permute_owners(owners, f"{seed}/rows")) for seed in range(20)}) > 3
    assert permute_owners([4, 4], "x") == [4, 4] and permute_owners([], "x") == []


def test_the_positives_pull() -> None:
    """Rows 0 and 2 have negatives with queries: 1 − cos of their own pairs, each row once."""
    owner = torch.tensor([1, 2, 7])

    def loops(q: Tensor, p: Tensor) -> Tensor:
        total = reference.zero()
        for i in (0, 2):
            a, b = q[i], p[i * GROUP]
            total = total + 1 - reference.dot(a, b) / torch.sqrt(reference.dot(a, a) * reference.dot(b, b))
        return total / 2

    check(lambda q, p: positive_penalty(q, p, owner), loops, random(3, 5, seed=1), random(9, 5, seed=2))


def test_pairs_are_rows_like_the_others() -> None:
    """The mean over five rows, whichever way they are put together."""
    scores, more, owner = random(3, 9, seed=1) * 3, random(2, 9, seed=2) * 3, torch.tensor([4, 8])
    loss = retrieval_objective(scores, group_size=GROUP)["loss"]
    alone = pair_rows(more, owner)
    found = with_pair_rows(loss, 3, alone, len(owner))
    targets = torch.tensor([0, 3, 6, 4, 8])
    expected = torch.nn.functional.cross_entropy(torch.cat([scores, more]), targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(more, owner), rtol=0, atol=1e-12)


def test_what_is_unused_changes_no_bit() -> None:
    loss, penalty = random(1, seed=1).requires_grad_(), random(1, seed=2).requires_grad_()
    found = unused(loss, penalty)
    assert found.equal(loss)
    assert [g.item() for g in torch.autograd.grad(found, [loss, penalty])] == [1.0, 0.0]


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guide_model": "g"}, "--guide_model has no effect without --false_negative_margin"),
        ({"margin_strategy": "relative"}, "--margin_strategy has no effect without --false_negative_margin"),
        ({"false_negative_margin": 2.5}, "from -2 to 2, got 2.5"),
        ({"false_negative_margin": 0.0, "margin_strategy": "both"}, "absolute or relative, got 'both'"),
        ({"distill_temperature": 0.0}, "--distill_temperature must be above 0"),
        ({"distill_loss": "mse"}, "--distill_loss must be published or kl"),
        ({"neg_q_control": "sham"}, "--neg_q_control must be none, unused, permuted or positive"),
        ({"neg_q_control": "permuted", "penalty_weight": 0.0}, "has no effect with --penalty_weight 0"),
        ({"neg_q_control": "unused", "neg_q_as_rows": True}, "use neg_q in two ways"),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveArguments(**values)


def test_when_neg_q_is_encoded() -> None:
    def encodes(**values: Any) -> bool:
        options = ObjectiveArguments(**values)
        return options.encodes_neg_q(options.penalty_weight)

    assert encodes() and not encodes(penalty_weight=0.0)
    assert encodes(penalty_weight=0.0, neg_q_as_rows=True) and encodes(penalty_weight=0.0, neg_q_control="unused")
