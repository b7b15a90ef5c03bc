"""Learning from scores: a teacher's over each group, and the sum of the three representations' over the batch.

Shape legend: B queries, M = B·G passages, G passages per query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.precision import full_precision


@full_precision
def knowledge_distillation(scores: Tensor, teacher_targets: Tensor, group_size: int) -> Tensor:
    """Listwise distillation over in-batch passages, one item of the group after another; a scalar.

    ``Σ_j mean_i t[i, j] · −log( exp s[i, i·G + j] / Σ_{m ∉ {i·G … i·G + j − 1}} exp s[i, m] )``: each passage of the
    group is learned as if it were the positive, against all in-batch passages but those of its group before it, as
    strongly as the teacher likes it. With all of the teacher's weight on the first passage it is ``info_nce``.

    Use it when the records carry a reranker's ``pos_scores`` and ``neg_scores``. Source: FlagEmbedding 1.2, the
    unified fine-tuning of BGE-M3 (Chen et al. 2024).

    Args:
        scores: student's, ``[B, M]`` floating, already divided by the temperature.
        teacher_targets: ``[B, G]`` floating, each row a distribution over the group (softmax of the teacher's scores).
        group_size: G.
    """
    first = torch.arange(scores.shape[0], device=scores.device) * group_size
    masked = torch.zeros_like(scores)
    total = scores.new_zeros(())
    for item in range(group_size):
        target = first + item
        losses = F.cross_entropy(scores + masked, target, reduction="none")  # [B]
        total = total + (teacher_targets[:, item] * losses).mean()
        # The lowest finite number rather than −inf: 0 · inf would be NaN.
        masked = masked.scatter(-1, target[:, None], torch.finfo(scores.dtype).min)
    return total


@full_precision
def group_kl(scores: Tensor, teacher_targets: Tensor, group_size: int) -> Tensor:
    """Listwise distillation over each query's own group: ``mean_i Σ_j t[i, j] · (log t[i, j] − log s̃[i, j])``.

    A scalar. s̃ is the softmax over the G scores of the group alone; other passages of the batch take no part. Use it
    where the teacher's order within the group is what is to be learned. Source: Cao et al. 2007 (ListNet), as
    Kullback-Leibler divergence.

    Args:
        scores: student's, ``[B, M]`` floating, already divided by the temperature.
        teacher_targets: ``[B, G]`` floating, each row a distribution over the group.
        group_size: G.
    """
    first = torch.arange(scores.shape[0], device=scores.device)[:, None] * group_size
    own = scores.gather(1, first + torch.arange(group_size, device=scores.device))  # [B, G]
    return F.kl_div(torch.log_softmax(own, dim=-1), teacher_targets, reduction="batchmean")


@full_precision
def self_distillation(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Soft cross entropy, a scalar, ``−mean_i Σ_m softmax(t_i)[m] · log softmax(s_i)[m]``; no gradient to the teacher.

    In unified fine-tuning the ensemble of the three scores teaches each of them. Source: Chen et al. 2024 (BGE-M3),
    section 3.3.

    Args:
        student_scores, teacher_scores: ``[B, M]`` floating, already divided by the temperature.
    """
    targets = torch.softmax(teacher_scores.detach(), dim=-1)
    return -(targets * torch.log_softmax(student_scores, dim=-1)).sum(dim=-1).mean()
