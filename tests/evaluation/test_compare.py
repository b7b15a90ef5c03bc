"""Tests of differences: against complete enumeration and textbook values, and the bookkeeping of a comparison."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from FlagEmbedding.evaluation.compare import compare_runs, main, score_run, unique_names
from FlagEmbedding.evaluation.metrics import parse_measures
from FlagEmbedding.evaluation.plots import plot_comparison
from FlagEmbedding.evaluation.report import most_changed
from FlagEmbedding.evaluation.significance import bootstrap_interval, holm, randomization_p
from FlagEmbedding.evaluation.systems import AVERAGE, System
from FlagEmbedding.evaluation.tables import p_text, shorten, signed_points
from FlagEmbedding.utils.errors import DataError
from tests.evaluation.conftest import cells

MEASURES = parse_measures(["ndcg@5", "recall@5"])


def enumerate_p(parts: list[np.ndarray]) -> float:
    """Two-sided p over all sign patterns of all queries, from the definition."""
    means = [part.mean() for part in parts]
    observed = abs(np.mean(means))
    flat = np.concatenate(parts)
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    hits = 0
    patterns = list(itertools.product([1, -1], repeat=len(flat)))
    for signs in patterns:
        statistic = np.mean([part.mean() for part in np.split(flat * np.array(signs), bounds)])
        hits += abs(statistic) >= observed - 1e-12
    return hits / len(patterns)


def test_randomization_test_is_the_enumeration_where_that_is_small() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        one = generator.normal(0.1, 0.3, 11)
        assert randomization_p([one]) == pytest.approx(enumerate_p([one]), abs=1e-12)
    # Two languages of different size: the statistic is the mean of their means, zeros keep out of the way.
    parts = [np.array([0.5, 0.2, 0.0, 0.3]), np.array([0.4, -0.1, 0.6, 0.1, 0.2, 0.0])]
    assert randomization_p(parts) == pytest.approx(enumerate_p(parts), abs=1e-12)
    # A small language for the system, a large one slightly against it: the plain mean over queries is about 0.
    parts = [np.array([0.5, 0.4, 0.6]), np.array([-0.1, -0.3, -0.2, 0.1, -0.2, -0.3, -0.1, -0.2])]
    assert randomization_p(parts) == pytest.approx(enumerate_p(parts), abs=1e-12)
    assert randomization_p(parts) < 0.5 < randomization_p([np.concatenate(parts)])
    assert randomization_p([np.zeros(5)]) == 1.0


def test_randomization_test_on_many_queries() -> None:
    generator = np.random.default_rng(1)
    # With many queries the test agrees with Student's.
    values = generator.normal(0.04, 0.3, 400)
    assert randomization_p([values], 20_000) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.005)
    nothing = generator.normal(0, 0.3, 400)
    p = randomization_p([nothing - nothing.mean() + 0.005], 2000)
    assert p > 0.5
    assert p == randomization_p([nothing - nothing.mean() + 0.005], 2000)
    assert p != randomization_p([nothing - nothing.mean() + 0.005], 2000, seed=1)
    assert p != randomization_p([nothing - nothing.mean() + 0.005], 1000)


def test_under_the_null_one_test_in_twenty_is_below_five_percent() -> None:
    generator = np.random.default_rng(2)
    below = sum(randomization_p([generator.normal(0, 1, 30)], 400, seed=i) < 0.05 for i in range(300))
    assert 6 <= below <= 26  # 15 expected; binomial, 99.7 %


def test_bootstrap_interval_covers_the_mean() -> None:
    generator = np.random.default_rng(3)
    values = generator.normal(0.2, 0.5, 300)
    low, high = bootstrap_interval([values], 4000)
    error = values.std(ddof=1) / np.sqrt(300)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert (low, high) == bootstrap_interval([values], 4000)
    # Of two languages it is the mean of the means that is bounded, however different their sizes are.
    small = np.array([0.0, 1.0] * 5)
    low, high = bootstrap_interval([values, small], 2000)
    assert low < (values.mean() + 0.5) / 2 < high
    assert high - low > 0.25
    assert bootstrap_interval([np.full(9, 0.25)]) == (0.25, 0.25)
    assert bootstrap_interval([np.array([0.25])]) == (0.25, 0.25)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def system(name: str, ranks: dict[str, dict[str, int | None]], depth: int = 10) -> System:
    """A system that has the one relevant passage of each query at the given rank."""
    languages = {}
    for lang, queries in ranks.items():
        qrels = {qid: {"right": 1} for qid in queries}
        run = {
            qid: {("right" if place == rank else f"wrong{place}"): 1.0 / place for place in range(1, depth + 1)}
            for qid, rank in queries.items()
        }
        languages[lang] = score_run(qrels, run, MEASURES)
    return System(name, languages)


def test_a_comparison_by_hand() -> None:
    base = system("base", {"ko": {"a": 1, "b": 2, "c": None}, "fa": {"x": None}})
    tuned = system("tuned", {"ko": {"a": 1, "b": 1, "c": 5}, "fa": {"x": 6}})
    found = compare_runs([base, tuned], MEASURES)
    assert [(c.language, c.measure) for c in found] == [
        (lang, measure) for lang in ("ko", "fa", AVERAGE) for measure in ("ndcg@5", "recall@5")
    ]
    ko, _, fa, *_ = found
    second, fifth = 1 / np.log2(3), 1 / np.log2(6)
    assert ko.baseline_mean == pytest.approx((1 + second) / 3)
    assert ko.system_mean == pytest.approx((2 + fifth) / 3)
    assert ko.difference == pytest.approx(ko.system_mean - ko.baseline_mean)
    assert (ko.queries, ko.better, ko.worse, ko.equal) == (3, 2, 0, 1)
    assert ko.p_value == 0.5  # two differences of one sign: 2 of 4 patterns
    assert (fa.difference, fa.p_value, fa.low, fa.high) == (0.0, 1.0, 0.0, 0.0)  # rank 6 is beyond @5
    average = found[4]
    assert average.difference == pytest.approx(ko.difference / 2)
    assert average.queries == 4
    assert all(c.p_holm >= c.p_value for c in found)
    scores = tuned.languages["fa"]
    assert (scores.first_relevant, scores.top) == ({"x": 6}, {"x": "wrong1"})


def test_three_systems_are_compared_in_all_pairs_or_in_those_asked_for() -> None:
    queries = {"ko": {f"q{i}": 1 + i % 4 for i in range(8)}}
    systems = [system(name, queries) for name in "abc"]
    pairs = [(c.baseline, c.system) for c in compare_runs(systems, MEASURES[:1])]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    pairs = [(c.baseline, c.system) for c in compare_runs(systems, MEASURES[:1], pairs=[(2, 0)])]
    assert pairs == [("c", "a")]


def test_holm_is_over_the_pairs_of_several_systems_too() -> None:
    ranks = {"a": 3, "b": 2, "c": 1}
    systems = [system(name, {"ko": {f"q{i}": rank for i in range(12)}}) for name, rank in ranks.items()]
    for found in compare_runs(systems, MEASURES[:1]):
        assert (found.p_value, found.p_holm) == (pytest.approx(2 / 2**12), pytest.approx(3 * 2 / 2**12))


def test_the_first_hit_is_that_of_the_measures() -> None:
    """Of equal scores the higher docid comes first, as trec_eval ranks them, wherever the run has it."""
    found = score_run({"q": {"b": 1}}, {"q": {"a": 1.0, "c": 0.5, "b": 1.0}}, MEASURES)
    assert (found.top, found.first_relevant) == ({"q": "b"}, {"q": 1})


def test_points_of_the_chart_are_filled_by_the_corrected_p(tmp_path: Path) -> None:
    systems = [system(name, {"ko": {f"q{i}": rank for i in range(6)}}) for name, rank in (("base", 2), ("tuned", 1))]
    tests = compare_runs(systems, MEASURES[:1], resamples=100)

    def chart(p_value: float, p_holm: float) -> bytes:
        changed = [replace(test, p_value=p_value, p_holm=p_holm) for test in tests]
        plot_comparison(tmp_path / "chart.png", systems, MEASURES[:1], changed)
        return (tmp_path / "chart.png").read_bytes()

    hollow = chart(0.01, 0.2)
    assert hollow == chart(0.2, 0.2)
    assert hollow != chart(0.01, 0.01)


def test_queries_that_changed_most() -> None:
    before = {"ko": {"a": 5, "b": 5, "c": 4, "d": 1, "e": 2, "f": 9, "g": 8, "h": 3, "i": 3, "j": 5}}
    after = {"ko": {"a": 1, "b": 2, "c": 1, "d": 5, "e": 3, "f": 9, "g": 7, "h": 2, "i": 2, "j": 1}}
    pair = (system("base", before), system("tuned", after))
    qrels = {"ko": {qid: {"right": 1, "wrong1": 0} for qid in before["ko"]}}
    gained = most_changed(pair, MEASURES[0], qrels, 1)
    assert [change.qid for change in gained] == ["a", "j", "c", "b", "h"]  # the five largest, equal ones by qid
    assert [change.qid for change in most_changed(pair, MEASURES[0], qrels, -1)] == ["d", "e"]
    assert gained[0].ranks == [5, 1]
    assert gained[0].values == [pytest.approx(1 / np.log2(6)), 1.0]
    assert gained[0].hits == {"relevant": "right", "first hit of base": "wrong1", "first hit of tuned": "right"}
    # Of equal changes in the measure, first the one whose first relevant passage moved further.
    pair = (system("base", {"ko": {"a": 6, "b": 6}}), system("tuned", {"ko": {"a": 5, "b": 1}}))
    assert [change.qid for change in most_changed(pair, MEASURES[1], qrels_of("ab"), 1)] == ["b", "a"]
    pair = (pair[1], pair[0])
    assert [change.qid for change in most_changed(pair, MEASURES[1], qrels_of("ab"), -1)] == ["b", "a"]


def qrels_of(qids: str) -> dict[str, dict[str, dict[str, int]]]:
    return {"ko": {qid: {"right": 1} for qid in qids}}


def test_different_queries_are_refused() -> None:
    one, other = system("one", {"ko": {"a": 1}}), system("other", {"ko": {"b": 1}})
    with pytest.raises(DataError, match="different queries of ko"):
        compare_runs([one, other], MEASURES)
    with pytest.raises(DataError, match="no scores for ko"):
        compare_runs([one, system("third", {"fa": {"a": 1}})], MEASURES)


def test_texts_in_cells() -> None:
    assert shorten("한강은 서울을 지나", 8) == "한강은…"  # Hangul takes two columns
    assert shorten("한강은 서울을\n지나 ", 18) == "한강은 서울을 지나"
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
    assert shorten("", 6) == ""
    assert (signed_points(-0.0123), signed_points(0.0), signed_points(-0.0001)) == ("−1.2", "0.0", "0.0")
    assert (signed_points(0.0123), signed_points(0.0001)) == ("+1.2", "0.0")
    assert (p_text(0.0004), p_text(0.001), p_text(0.05)) == ("<0.001", "0.001", "0.050")


def test_names_of_run_files() -> None:
    assert unique_names(["a/base.txt", "b/tuned.trec.gz"]) == ["base", "tuned"]
    assert unique_names(["a/ko.txt", "b/ko.txt"]) == ["a/ko.txt", "b/ko.txt"]


def test_run_files_of_any_system_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qrels.txt").write_text("".join(f"q{i} 0 right 1\n" for i in range(6)))
    (tmp_path / "topics.tsv").write_text("".join(f"q{i}\tquestion {i}\n" for i in range(6)), encoding="utf-8")
    for name, rank in (("bm25", 2), ("dense", 1)):
        lines = [
            f"q{i} Q0 {'right' if place == rank else place} {place} {1 / place} x\n"
            for i in range(6)
            for place in (1, 2, 3)
        ]
        (tmp_path / f"{name}.run").write_text("".join(lines))
    out = tmp_path / "out"
    words = [str(tmp_path / "bm25.run"), str(tmp_path / "dense.run"), "--qrels", str(tmp_path / "qrels.txt")]
    assert main([*words, "--topics", str(tmp_path / "topics.tsv"), "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert ["all", "nDCG@5", "6", "63.1", "100.0"] in [row[:5] for row in cells(printed)]
    assert "question 3" in printed
    assert {path.name for path in out.iterdir()} == {
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "per_query.tsv",
    }
    assert main([words[1], words[0], *words[2:], "--output_dir", str(out)]) == 0  # the first named is the baseline
    assert ["all", "nDCG@5", "6", "100.0", "63.1"] in [row[:5] for row in cells(capsys.readouterr().out)]
    assert main([*words[:1], *words[2:]]) == 2
    assert capsys.readouterr().err == "error: give two or more runs, and as many different --names\n"
