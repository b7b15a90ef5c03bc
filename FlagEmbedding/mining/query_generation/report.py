"""What the search for ``neg_q`` came to: a JSON record, a page of Markdown, and the list of what never passed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.rows import json_line
from FlagEmbedding.mining.query_generation.checks import REASONS
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.pages import percent, render

SOURCES = {
    "kept": "were there and stay",
    "reused": "a real query whose positive it is",
    "generated": "written by the model",
    "own_query": "none: answers its own row's query (a false negative)",
    "none": "none",
}
MEANING = {**REASONS, "no_answer": "the endpoint gave no answer"}
_PAGE, _DRY_RUN = (Path(__file__).with_name(name) for name in ("report.md.j2", "dry_run.md.j2"))

Listed = Iterable[tuple[str, list[tuple[int, str, str]]]]


def write_report(stem: Path, record: dict[str, Any], listed: Listed) -> Path:
    """Write ``stem``.json, ``stem``.md and, where something is ``listed``, ``stem``.rejected.jsonl.

    Returns:
        ``stem``.md.
    """
    report, page, rejected = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md", ".rejected.jsonl"))
    write_json_atomic(report, record)
    with atomic_open(page) as stream:
        stream.write(markdown(record))
    with atomic_open(rejected) as stream:
        for passage, tried in listed:
            attempts = [{"attempt": number + 1, "query": query, "reason": reason} for number, query, reason in tried]
            stream.write(json_line({"passage": passage, "tried": attempts}))
    if not rejected.stat().st_size:
        rejected.unlink()
    return page


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    places, different = record["negatives"], record["different"]
    total, distinct = sum(places.values()), sum(different.values())

    def line(meaning: str, *sources: str) -> list[object]:
        here, texts = (sum(counts.get(source, 0) for source in sources) for counts in (places, different))
        return [meaning, here, percent(here, total), texts, percent(texts, distinct)]

    sources = [line(what, source) for source, what in SOURCES.items() if source in places]
    sources.append(line("**covered**", "kept", "reused", "generated"))
    rejected: dict[str, dict[int, int]] = defaultdict(dict)
    for attempt, reason, count in record["rejected"]:
        rejected[reason][attempt] = count
    attempts = range(1, 2 + max((attempt for attempt, _, _ in record["rejected"]), default=-1))
    reasons = [
        [reason, *(counts.get(attempt - 1, 0) for attempt in attempts), MEANING[reason]]
        for reason, counts in sorted(rejected.items())
    ]
    headers = ["rejected", *(f"attempt {attempt}" for attempt in attempts), "meaning"]
    return render(_PAGE, record=record, model=record["model"], total=total, distinct=distinct, sources=sources,
                  reasons=reasons, attempts=attempts, headers=headers)  # fmt: skip


def dry_run_page(record: dict[str, Any]) -> str:
    """What a run would cost, before it does."""
    return render(_DRY_RUN, **record)
