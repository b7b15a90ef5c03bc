"""The doctor's page: what is wrong and what to do, then the figures behind it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.doctor.scan import FINDINGS
from FlagEmbedding.mining.doctor.scores import QUANTILES
from FlagEmbedding.utils.pages import of, render

_NAMES = {"query": "queries", "pos": "positives", "neg": "negatives", "neg_q": "queries of negatives"}
_TERMS = {
    "positive": "cosine of positives", "negative": "cosine of negatives",
    "margin": "lowest positive − negative", "penalty": "1 − cosine of a negative and its neg_q",
}  # fmt: skip


_PAGE = Path(__file__).with_name("report.md.j2")
SCORE_FIGURES = ("mean", *QUANTILES)
_QUANTILES = {"50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}


def length_figures(found: dict[str, Counter[int]], limits: dict[str, int]) -> dict[str, Any]:
    """Quantiles and the share beyond the limit, by role."""
    figures = {}
    for role, counts in found.items():
        total = counts.total()
        if not total:
            continue
        limit = limits.get("query_max_len" if role == "query" else "passage_max_len")
        over = sum(count for size, count in counts.items() if limit is not None and size > limit)
        figures[role] = {
            "texts": total, "mean": round(sum(size * count for size, count in counts.items()) / total, 1),
            **{name: _quantile(counts, share) for name, share in _QUANTILES.items()},
            "limit": limit, "over": over,
        }  # fmt: skip
    return figures


def _quantile(counts: Counter[int], share: float) -> int:
    left = share * counts.total()
    for size in sorted(counts):
        left -= counts[size]
        if left <= 0:
            break
    return size


def verdicts(record: dict[str, Any]) -> list[str]:
    """What a user should know first, most serious first."""
    found = []
    if record["problems"]["count"]:
        found.append(
            f"**{record['problems']['count']:,} rows or files cannot be read**: training refuses them (below)."
        )
    for name, serious in (("false_negative", True), ("own_query_as_neg_q", True), ("repeated_row", False)):
        count = record["findings"][name]["count"]
        if count:
            what, hint = FINDINGS[name]
            found.append(f"**{count:,} {what}**: {hint}." if serious else f"{count:,} {what}: {hint}.")
    scores = record.get("scores")
    if scores and scores["rows"]:
        rows, margins = scores["rows"], scores["margin"]["count"]
        above, solved = scores["negatives_above_positive"], scores["solved_rows"]
        if above:
            found.append(
                f"{of(above, margins)} negatives score above their row's lowest positive: hard ones, or unknown "
                "answers. hard_negatives --relative_margin 0.05 leaves such passages out."
            )
        if solved:
            found.append(
                f"{of(solved, rows)} rows are solved already (the positive gets 99 % of its group at temperature "
                f"{record['settings']['temperature']:g}), so they teach next to nothing"
                + (": mine harder negatives with this model." if solved > rows / 2 else ".")
            )
    for role, figures in record["lengths"].items():
        if figures["over"] > 0.01 * figures["texts"]:
            flag = "query_max_len" if role == "query" else "passage_max_len"
            found.append(
                f"{of(figures['over'], figures['texts'])} {_NAMES[role]} are cut off at --{flag} {figures['limit']}."
            )
    places, covered = record["neg_q"]["negatives"], record["neg_q"]["with_query"]
    if covered < places:
        found.append(
            f"{of(places - covered, places)} negatives have no neg_q and take no part in the penalty: "
            "python -m FlagEmbedding.mining.query_generation finds them."
        )
    return found or ["Nothing stands out."]


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    files = [
        [path, c["rows"], c["positives"], c["negatives"],
         *(of(c[key], c["negatives"]) for key in ("with_query", "known_answers")), c["with_scores"]]
        for path, c in record["files"].items()
    ]  # fmt: skip
    findings = [(*FINDINGS[name], found) for name, found in record["findings"].items() if found["count"]]
    scores = record["scores"] or {}
    terms = [
        [term, scores[name]["count"], *(f"{scores[name][key]:.3f}" for key in SCORE_FIGURES)]
        for name, term in _TERMS.items()
        if scores and scores[name]["count"]
    ]
    lengths = [
        [_NAMES[role], f["texts"], f["mean"], *(f[key] for key in _QUANTILES),
         *((f["limit"], of(f["over"], f["texts"])) if f["limit"] is not None else ("–", "–"))]
        for role, f in record["lengths"].items()
    ]  # fmt: skip
    suspects = [(f"{margin:.3f}", *rest) for margin, *rest in scores.get("suspects", ())]
    return render(
        _PAGE, record=record, settings=record["settings"], verdicts=verdicts(record), files=files, findings=findings,
        scores=scores, score_figures=SCORE_FIGURES, terms=terms, suspects=suspects, lengths=lengths,
    )  # fmt: skip
