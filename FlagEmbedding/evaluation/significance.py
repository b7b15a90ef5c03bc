"""Paired significance tests of two systems over the same queries.

One number per query (its difference) comes in one array per language; the statistic is the mean over languages of the
languages' means, which for one language is the plain mean.

- Randomization test (Fisher; for retrieval: Smucker, Allan, Carterette 2007): under the null hypothesis the two
  systems' names can be swapped on any query, so every difference may change its sign. Two-sided; exact where there
  are no more sign patterns than resamples.
- Interval: percentile bootstrap over queries, within each language.
- Holm (1979): all tests of a report together keep the chance of any false alarm at the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from FlagEmbedding.evaluation.arguments import RESAMPLES
from FlagEmbedding.utils.errors import UsageError

_BATCH_NUMBERS = 2_000_000  # random numbers held at a time


def randomization_p(differences: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of the paired randomization test on the macro mean of ``differences`` (one array per language)."""
    count = sum(map(len, differences))
    # Weighted so that the plain mean over all queries is the mean of the languages' means.
    weighted = np.concatenate([d * (count / (len(differences) * len(d))) for d in differences])
    weighted = weighted[weighted != 0]  # a zero keeps its value under every sign
    if len(weighted) < 2:
        return 1.0  # one difference is as far from 0 under either sign
    found = _scipy_stats().permutation_test(
        (weighted,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples,
        batch=max(1, _BATCH_NUMBERS // len(weighted)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def bootstrap_interval(
    values: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the macro mean of ``values`` (one array per language)."""
    if all(len(v) < 2 or np.ptp(v) == 0 for v in values):
        point = float(np.mean([v.mean() for v in values]))
        return point, point
    found = _scipy_stats().bootstrap(
        # scipy resamples arrays of one value only when told twice; a repeated value has the same mean.
        tuple(v if len(v) > 1 else np.repeat(v, 2) for v in values),
        _macro_mean, vectorized=True, method="percentile", n_resamples=resamples, confidence_level=level,
        batch=max(1, _BATCH_NUMBERS // sum(map(len, values))), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; the corrected values in the given order.

    The i-th smallest of m is multiplied by m − i + 1, then made no smaller than the one before it, at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, scaled))
    return [float(p) for p in corrected]


def _macro_mean(*values: np.ndarray, axis: int = -1) -> Any:
    return sum(np.mean(v, axis=axis) for v in values) / len(values)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UsageError("comparisons need scipy: pip install -e '.[eval]'") from error
    return stats
