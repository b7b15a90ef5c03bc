"""The retrieval objective: which losses apply to which scores, and their published weights."""

from __future__ import annotations

from torch import Tensor

from FlagEmbedding.losses.contrastive import info_nce
from FlagEmbedding.losses.distillation import knowledge_distillation, self_distillation

SPARSE_IN_ENSEMBLE = 0.3
SPARSE_WEIGHT = 0.1


def retrieval_objective(
    dense: Tensor,
    sparse: Tensor | None = None,
    colbert: Tensor | None = None,
    *,
    group_size: int,
    teacher_targets: Tensor | None = None,
    self_distill: bool = False,
) -> dict[str, Tensor]:
    """Contrastive loss, or knowledge distillation where a teacher speaks, over one or three representations.

    Dense alone: ``L = L_dense``. Unified (BGE-M3): ``L = (L_dense + L_ensemble + 0.1 L_sparse + L_colbert) / 4`` with
    ensemble scores ``dense + 0.3 sparse + colbert``. Self-distillation: ``L ← (L + (D + 0.1 S + C) / 3) / 2``, the
    ensemble teaching each of the three.

    Args:
        dense, sparse, colbert: scores over the temperature, ``[B, B·G]``; sparse and colbert both or neither.
        group_size: G.
        teacher_targets: ``[B, G]`` distributions, or None.
        self_distill: add self-distillation; has no effect on dense alone.

    Returns:
        Named scalars; ``total`` is what is minimised, ``contrastive`` (or ``distillation``) the part on dense scores.
    """

    def loss(scores: Tensor) -> Tensor:
        if teacher_targets is None:
            return info_nce(scores, group_size)
        return knowledge_distillation(scores, teacher_targets, group_size)

    name = "contrastive" if teacher_targets is None else "distillation"
    terms = {name: loss(dense)}
    if sparse is None or colbert is None:
        return {**terms, "total": terms[name]}
    ensemble = dense + SPARSE_IN_ENSEMBLE * sparse + colbert
    terms |= {"sparse": loss(sparse), "colbert": loss(colbert), "ensemble": loss(ensemble)}
    total = (terms[name] + terms["ensemble"] + SPARSE_WEIGHT * terms["sparse"] + terms["colbert"]) / 4
    if self_distill:
        for part, scores in (("dense", dense), ("sparse", sparse), ("colbert", colbert)):
            terms[f"self_{part}"] = self_distillation(scores, ensemble)
        soft = terms["self_dense"] + SPARSE_WEIGHT * terms["self_sparse"] + terms["self_colbert"]
        total = (total + soft / 3) / 2
    return {**terms, "total": total}
