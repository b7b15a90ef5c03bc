"""Learning from scores: a teacher's over each group, and the sum of the three representations' over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def knowledge_distillation(scores: Tensor, teacher_targets: Tensor, group_size: int) -> Tensor:
    """Listwise distillation over in-batch passages, item after item of the group.

    ``Σ_j mean_i t_ij · CE(s_i without the group's items before j, i·G + j)``: the query's passages are learned one by
    one, each against all in-batch passages but those of its group that came before (FlagEmbedding, BGE-M3).

    Args:
        scores: ``[B, M]`` of the student.
        teacher_targets: ``[B, G]``, each row a distribution over the group.
        group_size: G.

    Returns:
        scalar.
    """
    first = torch.arange(scores.shape[0], device=scores.device) * group_size
    masked = torch.zeros_like(scores)
    total = scores.new_zeros(())
    for item in range(group_size):
        target = first + item
        loss = F.cross_entropy(scores + masked, target, reduction="none")  # [B]
        total = total + (teacher_targets[:, item] * loss).mean()
        masked = masked.scatter(-1, target[:, None], torch.finfo(scores.dtype).min)
    return total


def self_distillation(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Soft cross entropy ``−mean_i Σ_m softmax(t_i)[m] · log softmax(s_i)[m]``; the teacher gets no gradient.

    Args:
        student_scores, teacher_scores: ``[B, M]``.

    Returns:
        scalar. Source: BGE-M3 (Chen et al. 2024), section 3.3.
    """
    targets = torch.softmax(teacher_scores.detach(), dim=-1)
    return -(targets * torch.log_softmax(student_scores, dim=-1)).sum(dim=-1).mean()
