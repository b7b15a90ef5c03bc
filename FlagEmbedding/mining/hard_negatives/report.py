"""What mining did, out of the notes of every query: a JSON record and a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.mining.hard_negatives.filters import REASONS
from FlagEmbedding.utils.io import atomic_open, write_json_atomic

_BINS = 20
_BAR = 40

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
    """The figures: candidates by fate, queries left short, scores, false negatives, ``neg_q`` kept."""
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


def write_report(stem: Path, record: dict[str, Any]) -> list[Path]:
    """Write ``record`` (``result`` of :func:`summarize`, and whatever led to it) as ``stem``.json and ``stem``.md."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(paths[0], record)
    with atomic_open(paths[1]) as stream:
        stream.write(markdown(record))
    return paths


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    result = record["result"]
    lines = [f"# Hard negatives: {record['output']}", "", f"{record['how']}.", ""]
    lines += _overview(result, record.get("skipped") or {})
    lines += ["", "## What became of the candidates", "", *_fates(result)]
    if result["scores"]:
        lines += ["", "## Scores", "", *_score_table(result["scores"])]
        for name in ("positive", "negative"):
            if name in result["scores"]:
                lines += ["", f"Histogram, {name}s:", "", *_histogram(result["scores"][name]["histogram"])]
    if result["scores"]:
        lines += ["", "## False negatives by the judgements", "", *_false_negatives(result)]
    if result["neg_q"]["places"]:
        kept, places = result["neg_q"]["kept"], result["neg_q"]["places"]
        lines += [
            "", "## neg_q", "",
            f"{result['neg_q']['before']} negatives had queries before; {kept} of {places} negatives have them now "
            f"({_percent(kept, places)}). The others are new and marked missing.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _overview(result: dict[str, Any], skipped: dict[str, int]) -> list[str]:
    wanted = result["negatives_wanted"]
    lines = ["| | |", "|---|---:|", f"| queries | {result['queries']:,} |", f"| rows written | {result['rows']:,} |"]
    lines += [f"| {name} | {count:,} |" for name, count in skipped.items()]
    lines += [
        f"| negatives | {result['negatives']:,} |",
        f"| queries with fewer than {wanted} in the window | {_of(result['short'], result['queries'])} |",
        f"| queries with none in the window | {_of(result['without'], result['queries'])} |",
        f"| negatives from beyond the window | {_of(result['filled'], result['negatives'])} |",
    ]
    return lines


def _fates(result: dict[str, Any]) -> list[str]:
    total = result["candidates"]
    lines = ["| candidates | number | share | meaning |", "|---|---:|---:|---|", f"| in the window | {total:,} | | |"]
    lines += [
        f"| left out: {reason} | {count:,} | {_percent(count, total)} | {_MEANING[reason]} |"
        for reason, count in result["left_out"].items()
    ]
    return [*lines, f"| may serve | {result['left']:,} | {_percent(result['left'], total)} | |"]


def _score_table(scores: dict[str, Any]) -> list[str]:
    names = list(scores)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines.append(f"| count | {' | '.join(format(scores[name]['count'], ',') for name in names)} |")
    for figure in ("mean", "std", "min", "25%", "50%", "75%", "max"):
        lines.append(f"| {figure} | {' | '.join(format(scores[name][figure], '.4f') for name in names)} |")
    return [*lines, "", "Difference: the lowest positive of the query less the negative."]


def _histogram(histogram: dict[str, Any]) -> list[str]:
    counts, edges = histogram["counts"], histogram["edges"]
    most = max(counts)
    rows = [
        f"{edges[i]:8.4f}  {count:>8,}  {'█' * round(_BAR * count / most)}".rstrip() for i, count in enumerate(counts)
    ]
    return ["```", *rows, "```"]


def _false_negatives(result: dict[str, Any]) -> list[str]:
    found, total = result["false_negatives"], result["candidates"]
    lines = [
        f"Relevant passages among the candidates: {_of(found['judged'], total)}; the score filters alone would let "
        f"{_of(found['judged_pass'], total)} through. None of them becomes a negative: the judgements exclude them.",
    ]
    if found["hidden"]:
        lines += [
            "",
            f"Relevant passages that judgements might have missed: of {found['hidden']:,} positives in the range of "
            "the window's scores, each in turn taken for unknown and measured against the query's other positives, "
            f"{_of(found['hidden_pass'], found['hidden'])} would pass the filters.",
        ]
    return lines


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part, whole)})"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"
