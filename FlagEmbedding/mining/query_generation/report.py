"""What the search for ``neg_q`` came to: a JSON record, a page of Markdown, and the list of what never passed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.jobs import json_line
from FlagEmbedding.mining.query_generation.checks import REASONS
from FlagEmbedding.utils.io import atomic_open, write_json_atomic

_SOURCES = {
    "kept": "were there and stay",
    "reused": "a real query whose positive it is",
    "generated": "written by the model",
    "own_query": "none: answers its own row's query (a false negative)",
    "none": "none",
}
_MEANING = {**REASONS, "no_answer": "the endpoint gave no answer"}

Listed = Iterable[tuple[str, list[tuple[int, str, str]]]]


def write_report(stem: Path, record: dict[str, Any], listed: Listed) -> list[Path]:
    """Write ``stem``.json, ``stem``.md and, where something is ``listed``, ``stem``.rejected.jsonl."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md", ".rejected.jsonl")]
    write_json_atomic(paths[0], record)
    with atomic_open(paths[1]) as stream:
        stream.write(markdown(record))
    with atomic_open(paths[2]) as stream:
        empty = True
        for passage, tried in listed:
            empty = False
            attempts = [{"attempt": number + 1, "query": query, "reason": reason} for number, query, reason in tried]
            stream.write(json_line({"passage": passage, "tried": attempts}))
    if empty:
        paths.pop().unlink()
    return paths


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    places, different = record["negatives"], record["different"]
    total, distinct = sum(places.values()), sum(different.values())
    lines = [
        f"# Queries of the negatives: {record['output']}", "",
        f"{record['rows']:,} rows, {total:,} negatives, {distinct:,} different.", "",
        "| query of a negative | negatives | share | different passages | share |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for source, meaning in _SOURCES.items():
        if places.get(source) or different.get(source):
            here, texts = places.get(source, 0), different.get(source, 0)
            figures = f"{here:,} | {_percent(here, total)} | {texts:,} | {_percent(texts, distinct)}"
            lines.append(f"| {meaning} | {figures} |")
    covered = sum(places.get(source, 0) for source in ("kept", "reused", "generated"))
    served = sum(different.get(source, 0) for source in ("kept", "reused", "generated"))
    lines.append(
        f"| **covered** | {covered:,} | {_percent(covered, total)} | {served:,} | {_percent(served, distinct)} |"
    )
    if record.get("model"):
        lines += _model_lines(record["model"], record["rejected"], record["left"])
    elif places.get("none"):
        lines += ["", "The rest needs a language model: --model with --base_url, or --local_model."]
    return "\n".join(lines) + "\n"


def _model_lines(model: dict[str, Any], rejected: list[list[Any]], left: int) -> list[str]:
    lines = [
        "", f"## {model['name']} ({model['where']})", "",
        f"{model['requests']:,} requests sent ({model['repeats_of_this_run']:,} repeats in this run); "
        f"{model['answers']:,} answers looked at, {model['prompt_tokens']:,} prompt and "
        f"{model['completion_tokens']:,} completion tokens as the endpoint counts them.",
    ]  # fmt: skip
    if model["round_trip"]:
        lines.append(f"Round trip: {model['round_trip']}; {model['round_trip_unjudged']:,} passages not in the corpus.")
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    for attempt, reason, count in rejected:
        counts[reason][attempt] = count
    if counts:
        attempts = range(max(attempt for attempt, _, _ in rejected) + 1)
        lines += ["", f"| rejected | {' | '.join(f'attempt {i + 1}' for i in attempts)} | meaning |"]
        lines.append(f"|---|{'---:|' * len(attempts)}---|")
        for reason in sorted(counts):
            figures = " | ".join(f"{counts[reason].get(i, 0):,}" for i in attempts)
            lines.append(f"| {reason} | {figures} | {_MEANING[reason]} |")
    if model["not_asked"]:
        lines += ["", f"{model['not_asked']:,} passages were not asked about: --max_requests was reached. Run again "
                  "with --overwrite True to go on; the answers so far cost nothing."]  # fmt: skip
    if left:
        lines += ["", f"{left:,} passages are left without a query; they stand in the .rejected.jsonl."]
    return lines


def dry_run_page(record: dict[str, Any]) -> str:
    """What a run would cost, before it does."""
    calls = record["calls"]
    lines = [
        f"{record['waiting']:,} different negatives need a query from {record['name']}; the cache has answers for "
        f"{record['cached']:,} of them",
        f"requests: {calls:,} in the first round; up to {calls * record['attempts']:,} if every answer is rejected "
        f"{record['attempts'] - 1} times, and more with repeats after failures",
        f"prompt tokens: about {record['prompt_tokens']:,} in the first round (4 ASCII or 2 other characters a token)",
        f"completion tokens: at most {record['completion_tokens_at_most']:,} in the first round (--max_tokens each)",
    ]
    if record["max_requests"] is not None:
        lines.append(f"--max_requests {record['max_requests']:,}: {record['already_sent']:,} are sent already")
    return "\n".join(lines) + "\n"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"
