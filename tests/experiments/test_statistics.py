"""Effects over seeds and queries against simulations and scipy's paired t test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments.statistics import effect


def tables(count: int, seeds: int, queries: int, sd: tuple[float, float, float], mean: float = 0.0) -> np.ndarray:
    """Tables ``[count, seeds, queries]`` of crossed random effects: sd of seeds, of queries, of the rest."""
    draw = np.random.default_rng(5)
    parts = [(count, seeds, 1), (count, 1, queries), (count, seeds, queries)]
    return mean + sum(size * draw.standard_normal(shape) for size, shape in zip(sd, parts, strict=True))


def test_with_one_seed_it_is_the_paired_t_test() -> None:
    differences = np.random.default_rng(0).standard_normal((1, 40)) + 0.3
    found, theirs = effect(differences), stats.ttest_1samp(differences[0], 0)
    interval = theirs.confidence_interval()
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.seeds_sd is None


@pytest.mark.parametrize("sd", [(0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.2, 0.2, 3.0)])
def test_no_difference_is_found_one_time_in_twenty(sd: tuple[float, float, float]) -> None:
    found = [effect(table) for table in tables(2000, 4, 50, sd)]
    false = float(np.mean([each.p < 0.05 for each in found]))
    assert 0.01 < false < 0.07
    covered = float(np.mean([each.low <= 0 <= each.high for each in found]))
    assert covered == pytest.approx(1 - false)


def test_queries_alone_would_find_what_seeds_did() -> None:
    """Why seeds count: averaged over seeds and tested over queries, one null in three would be called a difference."""
    many = tables(1000, 4, 50, (0.5, 1.0, 1.0))
    alone = [stats.ttest_1samp(table.mean(axis=0), 0).pvalue < 0.05 for table in many]
    assert np.mean(alone) > 0.2


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    sd = (0.0, 1.0, 0.5)
    detectable = float(np.median([effect(table).detectable for table in tables(200, 5, 80, sd)]))
    found = [effect(table).p < 0.05 for table in tables(1000, 5, 80, sd, mean=detectable)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_equal_rows_and_single_queries() -> None:
    same = effect(np.zeros((3, 10)))
    assert (same.mean, same.p, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    always = effect(np.full((3, 10), 0.25))
    assert (always.mean, always.p) == (0.25, 0.0)
    one = effect(np.array([[0.5], [0.4]]))  # one query says nothing of others
    assert one.p == 1.0 and one.low == -np.inf
