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

_BINS, _BAR = 20, 40
_JUDGED = ("judged", "judged_pass", "hidden", "hidden_pass")
_NEG_Q = ("before", "kept", "places")
_PAGE = Path(__file__).with_name("report.md.j2")


def summarize(notes: Iterable[dict[str, Any]], wanted: int) -> dict[str, Any]:
    """The figures: candidates by outcome, queries left short, scores, false negatives, ``neg_q`` kept."""
    reasons, totals, judged, queries = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    scores: dict[str, list[float]] = {"positive": [], "negative": [], "difference": []}
    for note in notes:
        reasons.update(note["counts"])
        totals.update(
            queries=1, rows=int(note["written"]), candidates=note["window"], negatives=note["found"] + note["filled"],
            filled=note["filled"], short=int(note["found"] < wanted), without=int(note["found"] == 0),
        )  # fmt: skip
        judged.update({name: note.get(name, 0) for name in _JUDGED})
        queries.update(dict(zip(_NEG_Q, note.get("neg_q", ()), strict=False)))
        scores["positive"] += note["pos"]
        scores["negative"] += note["neg"]
        scores["difference"] += [min(note["pos"]) - score for score in note["neg"] if note["pos"]]
    left_out = {reason: reasons[reason] for reason in REASONS if reasons[reason]}
    return {
        **{key: totals[key] for key in ("queries", "rows", "candidates", "negatives", "filled", "short", "without")},
        "negatives_wanted": wanted,
        "share_short": round(totals["short"] / totals["queries"], 6) if totals["queries"] else 0.0,
        "left_out": left_out,
        "left": totals["candidates"] - sum(left_out.values()),
        "false_negatives": {name: judged[name] for name in _JUDGED},
        "neg_q": {name: queries[name] for name in _NEG_Q},
        "scores": {name: describe(values) for name, values in scores.items() if values},
    }


def describe(values: list[float]) -> dict[str, Any]:
    """Count, mean, deviation, quartiles and a histogram of 20 equal bins."""
    array = np.asarray(values, dtype=np.float64)
    low, quarter, middle, three_quarters, high = np.quantile(array, [0, 0.25, 0.5, 0.75, 1])
    figures = {
        "mean": array.mean(), "std": array.std(), "min": low, "25%": quarter, "50%": middle, "75%": three_quarters,
        "max": high,
    }  # fmt: skip
    counts, edges = np.histogram(array, bins=_BINS)
    return {
        "count": len(values),
        **{name: round(float(value), 6) for name, value in figures.items()},
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
    for reason, count in result["left_out"].items():
        outcomes.append((f"left out: {reason}", count, percent(count, total), REASONS[reason]))
    outcomes.append(("may serve", result["left"], percent(result["left"], total), ""))
    scores = result["scores"].values()
    figures = [["count", *(score["count"] for score in scores)]]
    for name in ("mean", "std", "min", "25%", "50%", "75%", "max"):
        figures.append([name, *(f"{score[name]:.4f}" for score in scores)])
    return render(_PAGE, record=record, result=result, outcomes=outcomes, figures=figures, histogram=_histogram)


def _histogram(histogram: dict[str, Any]) -> str:
    """One line per bin: lower end, count, bar."""
    counts, edges = histogram["counts"], histogram["edges"]
    most = max(counts)
    return "\n".join(
        f"{edges[i]:8.4f}  {count:>8,}  {'█' * round(_BAR * count / most)}".rstrip() for i, count in enumerate(counts)
    )
