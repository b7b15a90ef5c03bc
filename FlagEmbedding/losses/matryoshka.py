"""Matryoshka representations: the first numbers of a vector are a vector too (Kusupati et al. 2022, arXiv 2205.13147).

Each loss on dense vectors is computed at every width, ``L = Σ_d w_d L(normalize(x[:d])) / Σ_d w_d``, so that vectors
may be cut to any of these widths and normalized again. sentence-transformers' MatryoshkaLoss is the same sum undivided.

Shape legend: B queries, M = B·G passages, D the full width, d one of the widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.losses.contrastive import dense_scores
from FlagEmbedding.utils.cli import option
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class MatryoshkaOptions:
    """Widths of the dense vector that are trained."""

    matryoshka_dims: list[int] = option(
        [], "Widths that the dense vector may be cut to, from the widest (768 512 256): each has the dense losses."
    )
    matryoshka_weights: list[float] = option([], "How much each width counts; default: all the same.")

    def check_widths(self, dimension: int | None = None) -> None:
        """Raise ``UsageError`` for widths that cannot be.

        Args:
            dimension: D; None: not known yet.
        """
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        given = f"--matryoshka_dims {' '.join(map(str, dims))}"
        if any(dim < 1 for dim in dims):
            raise UsageError(f"{given}: widths are 1 or more")
        if any(wide <= narrow for wide, narrow in pairwise(dims)):
            raise UsageError(f"{given}: expected each width once, from the widest to the narrowest")
        if weights and not dims:
            raise UsageError("--matryoshka_weights has no effect without --matryoshka_dims")
        if weights and len(weights) != len(dims):
            raise UsageError(
                f"--matryoshka_weights: expected {len(dims)} numbers, one for each width, got {len(weights)}"
            )
        if any(weight <= 0 or not math.isfinite(weight) for weight in weights):
            raise UsageError(f"--matryoshka_weights must be above 0, got {' '.join(f'{each:g}' for each in weights)}")
        if dimension is not None and dims and dims[0] > dimension:
            raise UsageError(f"{given}: the model's vectors have {dimension} dimensions, give at most that")


@dataclass(frozen=True)
class Widths:
    """The widths of a model's dense vectors.

    Attributes:
        dims, weights: as in ``MatryoshkaOptions``; the weights add up to 1.
        normalize: vectors are L2-normalized after they were cut.
    """

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    normalize: bool

    @classmethod
    def of(cls, options: MatryoshkaOptions, normalize: bool) -> Widths | None:
        """None where no widths are trained."""
        dims, weights = options.matryoshka_dims, options.matryoshka_weights or [1.0] * len(options.matryoshka_dims)
        shares = tuple(weight / sum(weights) for weight in weights)
        return cls(tuple(dims), shares, normalize) if dims else None

    def cut(self, vectors: Tensor) -> list[Tensor]:
        """``[N, D]`` to ``[N, d]`` for each width; the full width is the vectors themselves, bit by bit."""
        parts = [vectors[:, :dim] for dim in self.dims]
        normalized = [F.normalize(part, dim=-1) if self.normalize else part for part in parts]
        full = vectors.shape[1]
        return [vectors if dim == full else part for dim, part in zip(self.dims, normalized, strict=True)]

    def scores(self, q_reps: Tensor, p_reps: Tensor, temperature: float) -> list[Tensor]:
        """``dense_scores`` at each width, ``[B, M]``."""
        pairs = zip(self.cut(q_reps), self.cut(p_reps), strict=True)
        return [dense_scores(queries, passages, temperature) for queries, passages in pairs]

    def scored(self, q_reps: Tensor, p_reps: Tensor, temperature: float) -> ScoresByWidth:
        """These :meth:`scores`, for the objective."""
        return ScoresByWidth(self, self.scores(q_reps, p_reps, temperature))

    def mean(self, name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weighted mean of a loss under its ``name``, and each width's under ``name_d``."""
        total = sum(weight * value for weight, value in zip(self.weights, values, strict=True))
        return {name: total, **{f"{name}_{dim}": value for dim, value in zip(self.dims, values, strict=True)}}  # type: ignore[dict-item]


@dataclass(frozen=True)
class ScoresByWidth:
    """Dense scores ``[B, M]`` at each of ``widths``."""

    widths: Widths
    scores: Sequence[Tensor]

    def mean(self, name: str, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """``loss`` of the scores at each width: its mean under ``name``, and each under ``name_d``."""
        return self.widths.mean(name, [loss(scores) for scores in self.scores])


def mean_over_widths(
    widths: Widths | None, name: str, loss: Callable[..., Tensor], *vectors: Tensor
) -> dict[str, Tensor]:
    """``loss`` of vectors ``[N, D]``, or without widths of the whole ones alone."""
    if widths is None:
        return {name: loss(*vectors)}
    return widths.mean(name, [loss(*parts) for parts in zip(*map(widths.cut, vectors), strict=True)])
