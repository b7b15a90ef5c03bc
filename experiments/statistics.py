"""Is one row better than another, on other queries *and* with other seeds?

The differences of two rows form a table, seeds × queries. Seeds and queries are crossed random effects without
replication (Searle, Casella, McCulloch 1992, ch. 4): the variance of the mean is

    (MS_seeds + MS_queries − MS_rest) / (S · Q),

its degrees of freedom are Satterthwaite's, and p, interval and the minimum detectable difference follow from Student's
t distribution.
With one seed only the queries are random, and the result speaks of other queries alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

POWER = 0.8


@dataclass(frozen=True)
class Effect:
    """A mean difference (in the measure's unit) with what can be said of it.

    Attributes:
        low, high: 95 % interval.
        p: two-sided.
        detectable: the smallest true difference that such a table would find (p < .05) four times in five.
        seeds_sd: standard deviation of the seeds' means; None with one seed.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    seeds: int
    queries: int
    seeds_sd: float | None


def effect(differences: np.ndarray, level: float = 0.95) -> Effect:
    """Mean, interval and p of a table of differences ``[seeds, queries]``."""
    seeds, queries = differences.shape
    mean = float(differences.mean())
    variance, freedom = _variance(differences)
    error = float(np.sqrt(variance))
    reach = stats.t.ppf((1 + level) / 2, freedom)
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error > 0 else float(mean == 0)
    detectable = float((reach + stats.t.ppf(POWER, freedom)) * error)
    spread = float(differences.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    low, high = float(mean - reach * error), float(mean + reach * error)
    return Effect(mean, low, high, p, detectable, seeds, queries, spread)


def _variance(differences: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of ``[seeds, queries]``, and its degrees of freedom."""
    seeds, queries = differences.shape
    if queries < 2:
        return float("inf"), 1.0
    by_query = differences.mean(axis=0)
    if seeds == 1:
        return float(by_query.var(ddof=1) / queries), queries - 1.0
    by_seed, mean = differences.mean(axis=1), differences.mean()
    rest = differences - by_seed[:, None] - by_query[None, :] + mean
    squares = np.array([queries * by_seed.var(ddof=1), seeds * by_query.var(ddof=1), 0.0])
    freedom = np.array([seeds - 1, queries - 1, (seeds - 1) * (queries - 1)], dtype=float)
    squares[2] = (rest**2).sum() / freedom[2]
    # Not below what seeds or queries alone account for: the difference of mean squares may be negative by chance.
    whole = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    if whole == 0:
        return 0.0, float(freedom[2])
    return float(whole / (seeds * queries)), float(whole**2 / (squares**2 / freedom).sum())
