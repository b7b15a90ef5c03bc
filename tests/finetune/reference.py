"""The published objective written out as loops over queries, passages and tokens, in float64.

Independent of the package: it reads hidden states of transformers' own padded model and uses Python loops where the
package uses matrices. Slow on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def hidden_states(backbone: nn.Module, features: dict[str, Tensor]) -> Tensor:
    return backbone(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).last_hidden_state


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-12)


def dense_vector(states: Tensor, length: int, pooling: str, normalize: bool) -> Tensor:
    vector = states[0] if pooling == "cls" else sum(states[t] for t in range(length)) / length
    return unit(vector) if normalize else vector


def sparse_weights(
    states: Tensor, ids: list[int], length: int, head: nn.Linear, skipped: set[int]
) -> dict[int, Tensor]:
    """Weight of each distinct token of a row: the greatest over its occurrences."""
    weights: dict[int, Tensor] = {}
    for t in range(length):
        value = torch.relu((states[t] * head.weight[0]).sum() + head.bias[0])
        if ids[t] not in skipped and (ids[t] not in weights or value > weights[ids[t]]):
            weights[ids[t]] = value
    return weights


def colbert_vectors(states: Tensor, length: int, head: nn.Linear, normalize: bool) -> list[Tensor]:
    vectors = [head.weight @ states[t] + head.bias for t in range(1, length)]
    return [unit(vector) for vector in vectors] if normalize else vectors


def colbert_similarity(query: list[Tensor], passage: list[Tensor], passage_is_padded: bool) -> Tensor:
    """Mean over query tokens of the best passage token; a padded passage offers 0 as well (as published)."""
    total = torch.zeros((), dtype=torch.float64)
    for q in query:
        best = None
        for p in passage:
            value = (q * p).sum()
            best = value if best is None or value > best else best
        if passage_is_padded:
            best = best if best is not None and best > 0 else torch.zeros((), dtype=torch.float64)
        total = total + best
    return total / len(query)


def cross_entropy(row: list[Tensor], target: int) -> Tensor:
    peak = max(float(x) for x in row)
    return peak + torch.log(sum(torch.exp(x - peak) for x in row)) - row[target]


def info_nce(scores: list[list[Tensor]], group: int) -> Tensor:
    return sum(cross_entropy(row, i * group) for i, row in enumerate(scores)) / len(scores)


def distillation(scores: list[list[Tensor]], targets: list[list[float]], group: int) -> Tensor:
    """Term j: cross entropy against the group's item j over all passages but the group's earlier items."""
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(scores):
        for j in range(group):
            left = [x for m, x in enumerate(row) if not i * group <= m < i * group + j]
            total = total + targets[i][j] * cross_entropy(left, i * group)
    return total / len(scores)


def soft_cross_entropy(student: list[list[Tensor]], teacher: list[list[Tensor]]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s_row, t_row in zip(student, teacher, strict=True):
        values = [float(t) for t in t_row]
        peak = max(values)
        weights = [math.exp(v - peak) for v in values]
        for weight, k in zip(weights, range(len(s_row)), strict=True):
            total = total + weight / sum(weights) * cross_entropy(s_row, k)
    return total / len(student)


def objective(
    model: nn.Module,
    query: dict[str, Tensor],
    passage: dict[str, Tensor],
    neg_q: dict[str, Tensor] | None = None,
    teacher_scores: Tensor | None = None,
    *,
    pooling: str,
    normalize: bool,
    temperature: float,
    unified: bool,
    self_distill: bool,
    penalty_weight: float,
    skipped: set[int],
    backbone: nn.Module,
) -> Tensor:
    """The whole loss. ``model`` only lends its heads; ``backbone`` is a transformers model with the same weights."""
    tau = temperature if normalize else 1.0
    q_hidden, p_hidden = hidden_states(backbone, query), hidden_states(backbone, passage)
    q_lengths = query["attention_mask"].sum(1).tolist()
    p_lengths = passage["attention_mask"].sum(1).tolist()
    queries, passages = range(len(q_lengths)), range(len(p_lengths))
    group = len(p_lengths) // len(q_lengths)

    q_dense = [dense_vector(q_hidden[i], q_lengths[i], pooling, normalize) for i in queries]
    p_dense = [dense_vector(p_hidden[m], p_lengths[m], pooling, normalize) for m in passages]
    scores = {"dense": [[(q_dense[i] * p_dense[m]).sum() / tau for m in passages] for i in queries]}
    if unified:
        q_sparse = [
            sparse_weights(q_hidden[i], query["input_ids"][i].tolist(), q_lengths[i], model.sparse_linear, skipped)
            for i in queries
        ]
        p_sparse = [
            sparse_weights(p_hidden[m], passage["input_ids"][m].tolist(), p_lengths[m], model.sparse_linear, skipped)
            for m in passages
        ]
        zero = torch.zeros((), dtype=torch.float64)
        scores["sparse"] = [
            [
                sum((w * p_sparse[m][t] for t, w in q_sparse[i].items() if t in p_sparse[m]), zero) / tau
                for m in passages
            ]
            for i in queries
        ]
        longest = passage["input_ids"].shape[1]
        q_vectors = [colbert_vectors(q_hidden[i], q_lengths[i], model.colbert_linear, normalize) for i in queries]
        p_vectors = [colbert_vectors(p_hidden[m], p_lengths[m], model.colbert_linear, normalize) for m in passages]
        scores["colbert"] = [
            [colbert_similarity(q_vectors[i], p_vectors[m], p_lengths[m] < longest) / tau for m in passages]
            for i in queries
        ]
        scores["ensemble"] = [
            [scores["dense"][i][m] + 0.3 * scores["sparse"][i][m] + scores["colbert"][i][m] for m in passages]
            for i in queries
        ]

    if teacher_scores is not None:
        targets = torch.softmax(teacher_scores.double(), dim=-1).tolist()
        part = {name: distillation(matrix, targets, group) for name, matrix in scores.items()}
    else:
        part = {name: info_nce(matrix, group) for name, matrix in scores.items()}
    loss = part["dense"]
    if unified:
        loss = (part["dense"] + part["ensemble"] + 0.1 * part["sparse"] + part["colbert"]) / 4
        if self_distill:
            soft = {n: soft_cross_entropy(scores[n], scores["ensemble"]) for n in ("dense", "sparse", "colbert")}
            loss = (loss + (soft["dense"] + 0.1 * soft["sparse"] + soft["colbert"]) / 3) / 2

    if neg_q is not None and penalty_weight:
        n_hidden = hidden_states(backbone, neg_q)
        n_lengths = neg_q["attention_mask"].sum(1).tolist()
        by_owner: dict[int, list[Tensor]] = {}
        for k, owner in enumerate(neg_q["owner"].tolist()):
            vector = dense_vector(n_hidden[k], n_lengths[k], pooling, normalize)
            cosine = (unit(vector) * unit(p_dense[owner])).sum()
            by_owner.setdefault(owner, []).append(1 - cosine)
        if by_owner:
            penalty = sum(sum(values) / len(values) for values in by_owner.values()) / len(by_owner)
            loss = (1 - penalty_weight) * loss + penalty_weight * penalty
    return loss
