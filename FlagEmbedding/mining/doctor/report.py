"""The doctor's page: what is wrong and what to do, then the figures behind it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from FlagEmbedding.mining.doctor.scan import FINDINGS

_NAMES = {"query": "queries", "pos": "positives", "neg": "negatives", "neg_q": "queries of negatives"}
_TERMS = {
    "positive": "cosine of positives", "negative": "cosine of negatives",
    "margin": "lowest positive − negative", "penalty": "1 − cosine of a negative and its neg_q",
}  # fmt: skip


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
            what, cure = FINDINGS[name]
            found.append(f"**{count:,} {what}**: {cure}." if serious else f"{count:,} {what}: {cure}.")
    scores = record.get("scores")
    if scores and scores["rows"]:
        rows, margins = scores["rows"], scores["margin"]["count"]
        above, solved = scores["negatives_above_positive"], scores["solved_rows"]
        if above:
            found.append(
                f"{_of(above, margins)} negatives score above their row's lowest positive: hard ones, or unknown "
                "answers. hard_negatives --relative_margin 0.05 leaves such passages out."
            )
        if solved:
            found.append(
                f"{_of(solved, rows)} rows are solved already (the positive gets 99 % of its group at temperature "
                f"{record['settings']['temperature']:g}), so they teach next to nothing"
                + (": mine harder negatives with this model." if solved > rows / 2 else ".")
            )
    for role, figures in record["lengths"].items():
        if figures["over"] > 0.01 * figures["texts"]:
            flag = "query_max_len" if role == "query" else "passage_max_len"
            found.append(
                f"{_of(figures['over'], figures['texts'])} {_NAMES[role]} are cut off at --{flag} {figures['limit']}."
            )
    places, covered = record["neg_q"]["negatives"], record["neg_q"]["with_query"]
    if covered < places:
        cure = "python -m FlagEmbedding.mining.query_generation finds them" if places else ""
        found.append(
            f"{_of(places - covered, places)} negatives have no neg_q and take no part in the penalty: {cure}."
        )
    return found or ["Nothing stands out."]


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        f"# Training data: {record['what']}",
        "",
        *(f"- {verdict}" for verdict in verdicts(record)),
        "",
        "## Files",
        "",
    ]
    lines += ["| file | rows | positives | negatives | with neg_q | known answers among them | teacher scores |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for path, c in record["files"].items():
        queries, known = (_of(c[key], c["negatives"]) for key in ("with_query", "known_answers"))
        counts = f"{c['rows']:,} | {c['positives']:,} | {c['negatives']:,}"
        lines.append(f"| {path} | {counts} | {queries} | {known} | {c['with_scores']:,} |")
    lines += [
        "",
        "Known answers: negatives that are the positive of another query, which can be their neg_q for free.",
        "",
    ]
    lines += _problem_lines(record["problems"])
    lines += ["## Content", "", "| found | number | what to do |", "|---|---:|---|"]
    named = {name: finding for name, finding in record["findings"].items() if finding["count"]}
    lines += [f"| {FINDINGS[name][0]} | {f['count']:,} | {FINDINGS[name][1]} |" for name, f in named.items()]
    if not named:
        lines.append("| nothing | | |")
    for name, finding in named.items():
        lines += ["", f"First {FINDINGS[name][0]}:", "", *(f"- `{place}`" for place in finding["places"])]
    if record.get("scores"):
        lines += _score_lines(record["scores"], record["settings"])
    lines += _length_lines(record)
    return "\n".join(lines) + "\n"


def _problem_lines(problems: dict[str, Any]) -> list[str]:
    if not problems["count"]:
        return []
    shown = "" if problems["count"] <= len(problems["first"]) else f", the first {len(problems['first'])}"
    return ["## Problems", "", f"{problems['count']:,}{shown}:", "", *(f"- `{text}`" for text in problems["first"]), ""]


def _score_lines(scores: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    lines = [
        "", "## Scores", "", f"By {settings['model']}, {scores['rows']:,} rows; quantiles to within 0.005.", "",
        "![scores](scores.png)", "", "| | count | mean | min | 1% | 25% | 50% | 75% | 99% | max |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, term in _TERMS.items():
        f = scores[name]
        if f["count"]:
            quantiles = " | ".join(f"{f[key]:.3f}" for key in ("mean", "min", "1%", "25%", "50%", "75%", "99%", "max"))
            lines.append(f"| {term} | {f['count']:,} | {quantiles} |")
    rows = scores["rows"]
    lines += [
        "", f"- rows with a negative above a positive: {_of(scores['rows_with_one'], rows)}",
        f"- rows solved already: {_of(scores['solved_rows'], rows)}",
        f"- loss over a row's own group (no in-batch negatives) at temperature {settings['temperature']:g}: "
        f"{scores['mean_loss']:.4f} on average",
    ]  # fmt: skip
    if scores["suspects"]:
        lines += [
            "",
            "Lowest margins, which may be unknown answers:",
            "",
            "| margin | where | query | negative |",
            "|---:|---|---|---|",
        ]
        lines += [
            f"| {m:.3f} | {where} | {_cell(query)} | {_cell(text)} |" for m, where, query, text in scores["suspects"]
        ]
    return lines


def _length_lines(record: dict[str, Any]) -> list[str]:
    unit = record["settings"]["unit"]
    lines = [
        "", "## Lengths", "", f"In {unit}{', special tokens included' if unit == 'tokens' else ''}.", "",
        "![lengths](lengths.png)", "", "| | texts | mean | 50% | 90% | 99% | max | limit | cut off |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for role, f in record["lengths"].items():
        limit, over = (f"{f['limit']:,}", _of(f["over"], f["texts"])) if f["limit"] is not None else ("–", "–")
        sizes = " | ".join(f"{f[key]:,}" for key in ("mean", "50%", "90%", "99%", "max"))
        lines.append(f"| {_NAMES[role]} | {f['texts']:,} | {sizes} | {limit} | {over} |")
    if unit == "characters":
        lines += ["", "Tokens, and what is cut off, need a tokenizer: --model or --tokenizer."]
    return lines


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.2f} %)" if whole else f"{part:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
