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

    The penalty (``losses.penalty``) comes on top of ``total``. Source of the weights: FlagEmbedding 1.2 (Chen et al.
    2024, BGE-M3, equations 4 to 6, gives the forms).

    Args:
        dense, sparse, colbert: scores over the temperature, ``[B, B·G]`` floating; sparse and colbert both or neither.
        group_size: G.
        teacher_targets: ``[B, G]`` distributions, or None.
        self_distill: add self-distillation; has no effect on dense alone.

    Returns:
        Named scalars; ``total`` is what is minimised, ``contrastive`` (or ``distillation``) the part on dense scores,
        ``sparse``, ``colbert``, ``ensemble`` the unified parts, ``self_dense``, ``self_sparse``, ``self_colbert``
        the self-distillation; all unscaled but ``total``.

    Raises:
        ValueError: shapes that do not belong together, or one of sparse and colbert without the other.
    """
    _check_shapes(dense, sparse, colbert, teacher_targets, group_size)

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
