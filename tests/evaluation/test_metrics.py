"""Measures: by hand, against a loop that sorts and sums, and against pytrec_eval asked directly as trec_eval -c."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval

from FlagEmbedding.evaluation.metrics import Measure, evaluate, mean, parse_measure, parse_measures
from FlagEmbedding.utils.errors import DataError, UsageError

# Worked by hand. q1: c (grade 2) first, then a tie at 0.5 that goes to b (grade 0) before a (grade 1).
# q2: only x, not relevant. q3: judged, not in the run. q4: judged with grade 0 alone. q9: not judged.
QRELS = {"q1": {"a": 1, "b": 0, "c": 2}, "q2": {"y": 1}, "q3": {"z": 1}, "q4": {"w": 0}}
RUN = {"q1": {"a": 0.5, "b": 0.5, "c": 0.9}, "q2": {"x": 1.0}, "q4": {"w": 1.0}, "q9": {"a": 1.0}}
IDEAL = 2 + 1 / math.log2(3)
BY_HAND = {
    "ndcg@10": (2 + 1 / math.log2(4)) / IDEAL,
    "ndcg@2": 2 / IDEAL,
    "ndcg": (2 + 1 / math.log2(4)) / IDEAL,
    "recall@1": 1 / 2,
    "recall@3": 1.0,
    "p@2": 1 / 2,
    "p@10": 2 / 10,
    "map": (1 + 2 / 3) / 2,
    "map@2": 1 / 2,
    "mrr": 1.0,
    "mrr@1": 1.0,
}


def test_the_example_worked_by_hand() -> None:
    found = evaluate(QRELS, RUN, parse_measures(list(BY_HAND)))
    for key, value in BY_HAND.items():
        assert found[key]["q1"] == pytest.approx(value, abs=1e-12), key
        # Every judged query counts, whatever happened to it; one that nobody judged does not.
        assert found[key] == {"q1": found[key]["q1"], "q2": 0.0, "q3": 0.0, "q4": 0.0}
        assert mean(found[key]) == pytest.approx(value / 4)


def by_loop(grades: dict[str, int], hits: dict[str, float], measure: Measure) -> float:
    """One query's value, from the definition."""
    order = sorted(sorted(hits, reverse=True), key=lambda docid: -np.float32(hits[docid]))
    gains = [max(0, grades.get(docid, 0)) for docid in order]
    cut = gains if measure.cutoff is None else gains[: measure.cutoff]
    relevant = sum(grade > 0 for grade in grades.values())
    if measure.kind == "ndcg":
        ideal = sorted((max(0, g) for g in grades.values()), reverse=True)[: measure.cutoff]
        best = sum(gain / math.log2(place + 2) for place, gain in enumerate(ideal))
        return sum(gain / math.log2(place + 2) for place, gain in enumerate(cut)) / best if best else 0.0
    if measure.kind == "mrr":
        return next((1 / (place + 1) for place, gain in enumerate(cut) if gain > 0), 0.0)
    if relevant == 0:
        return 0.0
    if measure.kind == "recall":
        return sum(gain > 0 for gain in cut) / relevant
    if measure.kind == "p":
        assert measure.cutoff is not None
        return sum(gain > 0 for gain in cut) / measure.cutoff
    total = 0.0
    for place, gain in enumerate(cut):
        if gain > 0:
            total += sum(g > 0 for g in cut[: place + 1]) / (place + 1)
    return total / relevant


def collection(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """60 queries, grades 0 to 3, two thirds of the scores tied with others, some queries without results."""
    generator = np.random.default_rng(seed)
    docids = [f"{i}#{j}" for i in range(12) for j in range(4)]
    qrels, run = {}, {}
    for query in range(60):
        judged = generator.choice(docids, int(generator.integers(1, 12)), replace=False)
        qrels[f"q{query}"] = {str(d): int(generator.integers(0, 4)) for d in judged}
        if query % 7:
            found = generator.choice(docids, int(generator.integers(1, 40)), replace=False)
            run[f"q{query}"] = {str(d): float(generator.integers(0, 15)) / 15 for d in found}
    return qrels, run


NAMES = [
    "ndcg@1",
    "ndcg@5",
    "ndcg@10",
    "ndcg",
    "recall@5",
    "recall@20",
    "mrr@3",
    "mrr@10",
    "mrr",
    "map",
    "map@5",
    "p@5",
    "p@10",
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_measure_against_a_loop(seed: int) -> None:
    qrels, run = collection(seed)
    measures = parse_measures(NAMES)
    found = evaluate(qrels, run, measures)
    for measure in measures:
        assert found[measure.key].keys() == qrels.keys()
        for qid, grades in qrels.items():
            expected = by_loop(grades, run.get(qid, {}), measure)
            assert found[measure.key][qid] == pytest.approx(expected, abs=1e-9), (measure.key, qid)
    assert len({round(mean(values), 6) for values in found.values()}) > 8  # the measures do differ


def test_printed_values_are_those_of_trec_eval_with_c() -> None:
    qrels, run = collection(5)
    names = {
        "ndcg@5": "ndcg_cut_5",
        "ndcg@10": "ndcg_cut_10",
        "recall@20": "recall_20",
        "map": "map",
        "p@5": "P_5",
        "mrr": "recip_rank",
    }
    direct = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
    found = evaluate(qrels, run, parse_measures(list(names)))
    for key, theirs in names.items():
        # -c: the sum over queries with results, divided by the number of judged queries
        printed = f"{sum(values[theirs] for values in direct.values()) / len(qrels):.4f}"
        assert f"{mean(found[key]):.4f}" == printed, key


def test_one_depth_does_not_change_another() -> None:
    qrels, run = collection(3)
    together = evaluate(qrels, run, parse_measures(NAMES))
    for name in NAMES:
        assert evaluate(qrels, run, [parse_measure(name)])[name] == together[name]


@pytest.mark.parametrize(
    ("text", "key", "label"),
    [
        ("ndcg@10", "ndcg@10", "nDCG@10"),
        ("nDCG@10", "ndcg@10", "nDCG@10"),
        ("ndcg_cut.10", "ndcg@10", "nDCG@10"),
        ("ndcg_cut_10", "ndcg@10", "nDCG@10"),
        ("Recall@100", "recall@100", "Recall@100"),
        ("R@5", "recall@5", "Recall@5"),
        ("RR@10", "mrr@10", "MRR@10"),
        ("recip_rank", "mrr", "MRR"),
        ("AP", "map", "MAP"),
        ("P@5", "p@5", "P@5"),
    ],
)
def test_spellings(text: str, key: str, label: str) -> None:
    measure = parse_measure(text)
    assert (measure.key, measure.label) == (key, label)
    assert parse_measure(measure.label) == parse_measure(measure.key) == measure


@pytest.mark.parametrize("text", ["ndgc@10", "ndcg@0", "ndcg@", "recall", "p", "ndcg@ten", "", "@10", "10"])
def test_unknown_measures_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics"):
        parse_measure(text)


def test_lists_of_measures() -> None:
    assert [m.key for m in parse_measures(["ndcg@5,recall@20", "NDCG@5", "map"])] == ["ndcg@5", "recall@20", "map"]
    with pytest.raises(UsageError, match="at least one"):
        parse_measures([","])


def test_runs_of_other_queries_are_refused() -> None:
    with pytest.raises(DataError, match="no judged query is in the run"):
        evaluate({"q1": {"a": 1}}, {"5": {"a": 1.0}}, parse_measures(["ndcg@10"]))
