"""The table of modes: one line for each mode, one column for each language, each mode tested against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, System
from FlagEmbedding.evaluation.tables import p_text, points, signed_points
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.modes import Mode
from FlagEmbedding.utils.pages import table

MARK, LEVEL = "*", 0.05


def mode_table(modes: Sequence[Mode], systems: Sequence[System], measure: Measure, tests: Sequence[Comparison]) -> str:
    """Scores × 100; ``*``: differs from the first mode, p (Holm) below 0.05. The last columns test the average.

    Args:
        systems: one for each mode, in their order.
        tests: each later system against the first, of any measures.
    """
    shown = systems[0].shown
    found = {(c.system, c.language): c for c in tests if c.measure == measure.key}
    headers = [measure.label, *shown, "difference", "95 % interval", "p (Holm)"]
    lines = []
    for mode, system in zip(modes, systems, strict=True):
        cells = [mode.name]
        for lang in shown:
            test = found.get((system.name, lang))
            cells.append(points(system.mean(lang, measure)) + MARK * (test is not None and test.p_holm < LEVEL))
        test = found.get((system.name, shown[-1]))
        if test is None:
            lines.append([*cells, "", "", ""])
            continue
        span = f"{signed_points(test.low)} to {signed_points(test.high)}"
        lines.append([*cells, signed_points(test.difference), span, p_text(test.p_holm)])
    return table(headers, lines, range(1, len(headers)))


def write_mode_table(
    path: Path, modes: Sequence[Mode], systems: Sequence[System], measures: Sequence[Measure],
    tests: Sequence[Comparison], origin: dict[str, Any],
) -> str:  # fmt: skip
    """Write ``path`` (Markdown) and the same as JSON beside it; returns what an entry point prints."""
    pages = [mode_table(modes, systems, measure, tests) for measure in measures]
    over = (
        f"the average of {len(systems[0].languages)} languages" if systems[0].shown[-1] == AVERAGE else "the language"
    )
    said = (
        f"Scores × 100. {MARK}: differs from {modes[0].name} (paired randomization test, p below {LEVEL} after Holm's "
        f"correction over {len(tests)} tests). The last three columns are of {over}."
    )
    text = "\n\n".join([*pages, said])
    results = {
        mode.name: {lang: {m.key: system.mean(lang, m) for m in measures} for lang in system.shown}
        for mode, system in zip(modes, systems, strict=True)
    }
    try:
        with atomic_open(path) as stream:
            stream.write(f"# {path.parent.name}: modes\n\n{text}\n")
        tested = [asdict(test) for test in tests]
        write_json_atomic(path.with_suffix(".json"), {"results": results, "tests": tested, **origin})
    except OSError as error:
        raise DataError(f"{path}: the table cannot be written there: {error.strerror}") from error
    return f"{text}\n\n{path}"
