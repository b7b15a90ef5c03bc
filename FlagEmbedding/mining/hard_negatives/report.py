"""What mining did, out of the notes of every query: a JSON record and a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.mining.hard_negatives.filters import REASONS
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.pages import percent, render

_BINS = 20
_BAR = 40
_PAGE = Path(__file__).with_name("report.md.j2")

_MEANING = {
    "judged_positive": "answers the query, by qrels or training rows",
    "same_as_positive": "text of a positive under another id",
    "same_as_query": "text of the query",
    "repeated": "text of a candidate ranked higher",
    "absolute_margin": "score + margin above the positive's",
    "relative_margin": "score above positive − margin · abs(positive)",
    "max_score": "score above the limit",
    "min_score": "score below the limit",
}


def summarize(notes: Iterable[dict[str, Any]], wanted: int) -> dict[str, Any]:
    """The figures: candidates by outcome, queries left short, scores, false negatives, ``neg_q`` kept."""
    reasons, totals = Counter[str](), Counter[str]()
    scores: dict[str, list[float]] = {"positive": [], "negative": [], "difference": []}
    for note in notes:
        reasons.update(note["counts"])
        totals.update(
            {
                "queries": 1,
                "rows": note["written"],
                "candidates": note["window"],
                "short": note["found"] < wanted,
                "without": note["found"] == 0,
                "negatives": note["found"] + note["filled"],
                "filled": note["filled"],
                **{key: note.get(key, 0) for key in ("judged", "judged_pass", "hidden", "hidden_pass")},
            }
        )
        if "neg_q" in note:
            before, kept, after = note["neg_q"]
            totals.update({"neg_q_before": before, "neg_q_kept": kept, "neg_q_places": after})
        scores["positive"] += note["pos"]
        scores["negative"] += note["neg"]
        if note["pos"]:
            scores["difference"] += [min(note["pos"]) - score for score in note["neg"]]
    left_out = {reason: reasons[reason] for reason in REASONS if reasons[reason]}
    return {
        **{key: totals[key] for key in ("queries", "rows", "candidates", "negatives", "filled", "short", "without")},
        "negatives_wanted": wanted,
        "share_short": _share(totals["short"], totals["queries"]),
        "left_out": left_out,
        "left": totals["candidates"] - sum(left_out.values()),
        "false_negatives": {key: totals[key] for key in ("judged", "judged_pass", "hidden", "hidden_pass")},
        "neg_q": {key: totals[f"neg_q_{key}"] for key in ("before", "kept", "places")},
        "scores": {name: describe(values) for name, values in scores.items() if values},
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def describe(values: list[float]) -> dict[str, Any]:
    """Count, mean, deviation, quartiles and a histogram of 20 equal bins."""
    array = np.asarray(values, dtype=np.float64)
    low, quarter, middle, three_quarters, high = np.quantile(array, [0, 0.25, 0.5, 0.75, 1]).tolist()
    counts, edges = np.histogram(array, bins=_BINS)
    figures = {
        "mean": float(array.mean()), "std": float(array.std()), "min": low, "25%": quarter, "50%": middle,
        "75%": three_quarters, "max": high,
    }  # fmt: skip
    return {
        "count": len(values),
        **{name: round(value, 6) for name, value in figures.items()},
        "histogram": {"edges": [round(edge, 6) for edge in edges.tolist()], "counts": counts.tolist()},
    }


def write_report(stem: Path, record: dict[str, Any]) -> Path:
    """Write ``record`` (``result`` of :func:`summarize`, and whatever led to it) as ``stem``.json and a page.

    Returns:
        ``stem``.md.
    """
    page = stem.with_name(f"{stem.name}.md")
    write_json_atomic(stem.with_name(f"{stem.name}.json"), record)
    with atomic_open(page) as stream:
        stream.write(markdown(record))
    return page


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    result, total = record["result"], record["result"]["candidates"]
    outcomes = [("in the window", total, "", "")]
    outcomes += [
        (f"left out: {reason}", count, percent(count, total), _MEANING[reason])
        for reason, count in result["left_out"].items()
    ]
    outcomes.append(("may serve", result["left"], percent(result["left"], total), ""))
    scores = result["scores"]
    figures = [["count", *(figures["count"] for figures in scores.values())]]
    for name in ("mean", "std", "min", "25%", "50%", "75%", "max"):
        figures.append([name, *(f"{figures[name]:.4f}" for figures in scores.values())])
    return render(_PAGE, record=record, result=result, outcomes=outcomes, figures=figures, histogram=_histogram)


def _histogram(histogram: dict[str, Any]) -> str:
    """One line per bin: lower end, count, bar."""
    counts, edges = histogram["counts"], histogram["edges"]
    most = max(counts)
    return "\n".join(
        f"{edges[i]:8.4f}  {count:>8,}  {'█' * round(_BAR * count / most)}".rstrip() for i, count in enumerate(counts)
    )
