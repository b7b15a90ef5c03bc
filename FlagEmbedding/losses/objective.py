"""The retrieval objective: its options, which losses apply to which scores, and their published weights.

Every function returns named scalars. The names are those of the training log; ``loss`` is what is minimized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from FlagEmbedding.losses.contrastive import info_nce
from FlagEmbedding.losses.distillation import group_kl, knowledge_distillation, self_distillation
from FlagEmbedding.losses.matryoshka import MatryoshkaOptions, ScoresByWidth
from FlagEmbedding.losses.options import ControlOptions, DistillationOptions, DistillLoss, FalseNegativeOptions, refuse
from FlagEmbedding.losses.penalty import apply_penalty
from FlagEmbedding.losses.router import load_balance_loss, z_loss
from FlagEmbedding.utils.cli import option, switch
from FlagEmbedding.utils.errors import UsageError

SPARSE_IN_ENSEMBLE = 0.3
SPARSE_WEIGHT = 0.1

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class ObjectiveArguments(MatryoshkaOptions, ControlOptions, DistillationOptions, FalseNegativeOptions):
    """Objective: what is minimized."""

    penalty_weight: float = option(
        0.1, "λ of the contrastive learning penalty: loss × (1 − λ) + λ × penalty. 0 switches it off."
    )
    temperature: float = option(0.02, "τ; 1 when embeddings are not normalized.")
    negatives_cross_device: bool = switch(False, "Passages of all processes serve as in-batch negatives.")
    unified_finetuning: bool = switch(False, "Train dense, sparse and colbert representations together.")
    use_self_distill: bool = switch(False, "With unified fine-tuning: their sum teaches each of the three.")
    self_distill_start_step: int = option(-1, "Forwards (not optimizer steps) after which self-distillation counts.")
    router_aux_loss_coef: float = option(0.0, "Weight of the Switch load balance loss.")
    router_z_loss_coef: float = option(0.0, "Weight of the router z-loss.")

    def __post_init__(self) -> None:
        if not 0 <= self.penalty_weight <= 1:
            raise UsageError(f"--penalty_weight is λ in [0, 1], got {self.penalty_weight}")
        if self.temperature <= 0:
            raise UsageError(f"--temperature must be above 0, got {self.temperature}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} must not be negative, got {getattr(self, name)}")
        refuse(self.margin_complaints() + self.distillation_complaints() + self.control_complaints(self.penalty_weight))
        self.check_widths()

    @property
    def has_router_loss(self) -> bool:
        """True when a loss of the router is added, which reads the routing of all tokens."""
        return self.router_aux_loss_coef > 0 or self.router_z_loss_coef > 0


def retrieval_objective(
    dense: Tensor, sparse: Tensor | None = None, colbert: Tensor | None = None, *, group_size: int,
    teacher_targets: Tensor | None = None, self_distill: bool = False, mask: Tensor | None = None,
    distill_loss: DistillLoss = "published", by_width: ScoresByWidth | None = None,
) -> Terms:  # fmt: skip
    """Contrastive loss, or knowledge distillation where a teacher speaks, over one or three representations.

    Dense alone: ``L = L_dense``. Unified (BGE-M3): ``L = (L_dense + L_ensemble + 0.1 L_sparse + L_colbert) / 4`` with
    ensemble scores ``dense + 0.3 sparse + colbert``. Self-distillation: ``L ← (L + (D + 0.1 S + C) / 3) / 2``, the
    ensemble teaching each of the three.

    Penalty and router losses come on top (``add_penalty``, ``add_router_losses``). Source of the weights: FlagEmbedding
    1.2 (Chen et al. 2024, BGE-M3, equations 4 to 6, gives the forms).

    Args:
        dense, sparse, colbert: scores over the temperature, ``[B, B·G]`` floating; sparse and colbert both or neither.
        group_size: G.
        teacher_targets: ``[B, G]`` distributions, or None.
        self_distill: add self-distillation; has no effect on dense alone.
        mask: ``[B, B·G]`` bool, passages that are no negatives of a query (``losses.false_negatives``).
            Self-distillation compares all passages whatever they are: there is no negative in it.
        distill_loss: with a teacher, how it is learned from.
        by_width: dense scores at several widths: losses of the dense representation are means over these.

    Returns:
        ``loss``; ``contrastive_loss`` (or ``distillation``), the part on dense scores; ``sparse``, ``colbert``,
        ``ensemble``, the unified parts; ``self_dense``, ``self_sparse``, ``self_colbert``, the self-distillation. All
        unscaled but ``loss``.

    Raises ``ValueError``: shapes that do not belong together, or one of sparse and colbert without the other.
    """
    _check_shapes(dense, sparse, colbert, teacher_targets, group_size)

    def loss(scores: Tensor) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        if teacher_targets is not None and distill_loss == "kl":
            return group_kl(scores, teacher_targets, group_size)
        if teacher_targets is None:
            return info_nce(scores, group_size)
        return knowledge_distillation(scores, teacher_targets, group_size)

    name = "contrastive_loss" if teacher_targets is None else "distillation"
    terms = {name: loss(dense)} if by_width is None else by_width.mean(name, loss)
    if sparse is None or colbert is None:
        return {**terms, "loss": terms[name]}
    ensemble = dense + SPARSE_IN_ENSEMBLE * sparse + colbert
    terms |= {"sparse": loss(sparse), "colbert": loss(colbert), "ensemble": loss(ensemble)}
    total = (terms[name] + terms["ensemble"] + SPARSE_WEIGHT * terms["sparse"] + terms["colbert"]) / 4
    if self_distill:
        for part, scores in (("dense", dense), ("sparse", sparse), ("colbert", colbert)):
            terms[f"self_{part}"] = self_distillation(scores, ensemble)
        if by_width is not None:
            terms |= by_width.mean("self_dense", lambda scores: self_distillation(scores, ensemble))
        soft = terms["self_dense"] + SPARSE_WEIGHT * terms["self_sparse"] + terms["self_colbert"]
        total = (total + soft / 3) / 2
    return {**terms, "loss": total}


def add_penalty(terms: Terms, penalty: Tensor, weight: float) -> Terms:
    """``terms`` with ``penalty``, and ``loss`` weighed against it (see ``losses.penalty``)."""
    return {**terms, "penalty": penalty, "loss": apply_penalty(terms["loss"], penalty, weight)}


def add_router_losses(
    terms: Terms, layers: Sequence[tuple[Tensor, Tensor]], options: ObjectiveArguments, unweighted: bool = True
) -> Terms:
    """``terms`` with the routers' balance and z-loss, the mean over layers; added to ``loss`` only where weighted.

    Args:
        layers: per MoE layer, logits ``[T, E]`` floating and chosen experts ``[T, K]`` int64 of all real tokens.
        options: the weights.
        unweighted: also compute one whose weight is 0.

    Returns:
        Also ``router_aux_loss`` and ``router_z_loss``, unscaled, and ``…_scaled`` where a weight applies.
    """
    losses: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
        "router_aux_loss": (options.router_aux_loss_coef, load_balance_loss),
        "router_z_loss": (options.router_z_loss_coef, lambda logits, _: z_loss(logits)),
    }
    terms = dict(terms)
    for name, (weight, loss) in losses.items():
        if weight == 0 and not unweighted:
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):  # without a weight it is only logged
            terms[name] = torch.stack([loss(*layer) for layer in layers]).mean()
        if weight > 0:
            terms[f"{name}_scaled"] = weight * terms[name]
            terms["loss"] = terms["loss"] + terms[f"{name}_scaled"]
    return terms


def _check_shapes(
    dense: Tensor, sparse: Tensor | None, colbert: Tensor | None, teacher_targets: Tensor | None, group_size: int
) -> None:
    # Out-of-range targets end in an assertion inside a CUDA kernel that names nothing; say it here.
    queries = dense.shape[0]
    if dense.shape[1] != queries * group_size:
        raise ValueError(f"{queries} queries of {group_size} passages need {queries * group_size} score columns, "
                         f"got {dense.shape[1]}")  # fmt: skip
    if (sparse is None) != (colbert is None):
        raise ValueError("unified scores need sparse and colbert together, or neither")
    for name, scores in (("sparse", sparse), ("colbert", colbert)):
        if scores is not None and scores.shape != dense.shape:
            raise ValueError(f"{name} scores of shape {tuple(scores.shape)}, dense ones of {tuple(dense.shape)}")
    if teacher_targets is not None and teacher_targets.shape != (queries, group_size):
        raise ValueError(f"teacher targets need shape {(queries, group_size)}, got {tuple(teacher_targets.shape)}")
