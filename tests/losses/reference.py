"""Every loss written out as loops over float64 numbers: what the package computes with matrices.

Independent of the package. Gradients come from autograd through these loops. Slow on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Matrix = list[list[Tensor]]


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> Tensor:
    total = zero()
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def dense(queries: Tensor, passages: Tensor, temperature: float) -> Matrix:
    return [[dot(q, p) / temperature for p in passages] for q in queries]


def token_rows(ids: Tensor, weights: Tensor, lengths: list[int], skip: list[int]) -> list[dict[int, Tensor]]:
    """Row by row, token -> its greatest weight."""
    rows, place = [], 0
    for length in lengths:
        row: dict[int, Tensor] = {}
        for t in range(place, place + length):
            token = int(ids[t])
            if token not in skip and (token not in row or weights[t] > row[token]):
                row[token] = weights[t]
        rows.append(row)
        place += length
    return rows


def sparse(q_rows: list[dict[int, Tensor]], p_rows: list[dict[int, Tensor]], temperature: float) -> Matrix:
    matrix = []
    for q in q_rows:
        matrix.append([sum((w * p[t] for t, w in q.items() if t in p), zero()) / temperature for p in p_rows])
    return matrix


def sparse_over_the_vocabulary(
    ids: Tensor, weights: Tensor, lengths: list[int], skip: list[int], vocabulary: int
) -> Tensor:
    """The published formulation: rows x tokens x vocabulary, its maximum over tokens, special tokens zeroed."""
    longest = max(lengths)
    table = torch.zeros(len(lengths), longest, vocabulary, dtype=weights.dtype)
    place = 0
    for row, length in enumerate(lengths):
        for t in range(length):
            table[row, t, int(ids[place + t])] = weights[place + t]
        place += length
    vectors = table.max(dim=1).values.clone()
    vectors[:, skip] = 0
    return vectors


def colbert(q_rows: list[Tensor], p_rows: list[Tensor], padded_length: int, temperature: float) -> Matrix:
    """Rows hold real tokens only. A passage shorter than ``padded_length`` offers similarity 0 as well."""
    matrix = []
    for q in q_rows:
        line = []
        for p in p_rows:
            total = zero()
            for a in q:
                values = [dot(a, b) for b in p] + ([zero()] if len(p) < padded_length else [])
                best = values[0]
                for value in values[1:]:
                    best = value if value > best else best
                total = total + best
            line.append(total / len(q) / temperature)
        matrix.append(line)
    return matrix


def cross_entropy(row: list[Tensor], target: int) -> Tensor:
    """−log of the target's share in the sum of exponentials, shifted by the greatest score."""
    peak = max(x.item() for x in row)
    total = zero()
    for x in row:
        total = total + torch.exp(x - peak)
    return peak + torch.log(total) - row[target]


def info_nce(scores: Matrix, group: int) -> Tensor:
    return sum((cross_entropy(row, i * group) for i, row in enumerate(scores)), zero()) / len(scores)


def knowledge_distillation(scores: Matrix, targets: Tensor, group: int) -> Tensor:
    total = zero()
    for j in range(group):
        term = zero()
        for i, row in enumerate(scores):
            left = [x for m, x in enumerate(row) if not i * group <= m < i * group + j]
            term = term + targets[i][j] * cross_entropy(left, i * group)
        total = total + term / len(scores)
    return total


def self_distillation(student: Matrix, teacher: Matrix) -> Tensor:
    total = zero()
    for s_row, t_row in zip(student, teacher, strict=True):
        values = [t.item() for t in t_row]
        shares = [math.exp(v - max(values)) for v in values]
        for m, share in enumerate(shares):
            total = total + share / sum(shares) * cross_entropy(s_row, m)
    return total / len(student)


def objective(
    d: Matrix, s: Matrix | None, c: Matrix | None, group: int, targets: Tensor | None, self_distill: bool
) -> Tensor:
    def loss(scores: Matrix) -> Tensor:
        return info_nce(scores, group) if targets is None else knowledge_distillation(scores, targets, group)

    if s is None or c is None:
        return loss(d)
    e = [[d[i][m] + 0.3 * s[i][m] + c[i][m] for m in range(len(d[0]))] for i in range(len(d))]
    total = (loss(d) + loss(e) + 0.1 * loss(s) + loss(c)) / 4
    if self_distill:
        soft = (self_distillation(d, e) + 0.1 * self_distillation(s, e) + self_distillation(c, e)) / 3
        total = (total + soft) / 2
    return total


def penalty(passages: Tensor, queries: Tensor, owner: list[int]) -> Tensor | None:
    """None when no negative has a query."""
    by_passage: dict[int, list[Tensor]] = {}
    for k, row in enumerate(owner):
        q, p = queries[k], passages[row]
        cosine = dot(q, p) / torch.sqrt(dot(q, q)) / torch.sqrt(dot(p, p))
        by_passage.setdefault(row, []).append(1 - cosine)
    if not by_passage:
        return None
    return sum((sum(values, zero()) / len(values) for values in by_passage.values()), zero()) / len(by_passage)


def load_balance(logits: Tensor, experts: Tensor) -> Tensor:
    tokens, count = logits.shape
    total = zero()
    for e in range(count):
        share = sum(int(choice) == e for row in experts for choice in row) / experts.numel()
        probability = zero()
        for x in logits:
            probability = probability + torch.exp(x[e]) / sum((torch.exp(v) for v in x), zero()) / tokens
        total = total + share * probability
    return count * total


def z(logits: Tensor) -> Tensor:
    total = zero()
    for x in logits:
        total = total + torch.log(sum((torch.exp(v) for v in x), zero())) ** 2
    return total / len(logits)


def entropy(logits: Tensor) -> float:
    total = 0.0
    for x in logits.tolist():
        weights = [math.exp(v) for v in x]
        total -= sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    return total / len(logits)
