"""Scores and comparisons for people: Markdown tables, a per-query file, the queries that changed most, a chart.

Files keep trec_eval's scale of 0 to 1; tables and charts show × 100 and say so. Query texts go into tables only,
since a plotting font seldom has every script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.trec import Qrels
from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.plots import plot_comparison
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, System
from FlagEmbedding.evaluation.tables import markdown_table, p_text, points, shorten, signed_points
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike, atomic_open, write_json_atomic

_EXTREMES = 5  # queries shown of those that gained, and of those that lost most; at least 2 a language


@dataclass(frozen=True)
class Texts:
    """What single queries can be shown with.

    Attributes:
        queries: language -> qid -> query text; languages may be missing.
        qrels: language -> judgements.
        passages: (language, docids) -> docid -> text, or None where the corpus is not at hand.
    """

    queries: dict[str, dict[str, str]]
    qrels: dict[str, Qrels]
    passages: Callable[[str, set[str]], dict[str, str]] | None = field(default=None)


def score_table(systems: Sequence[System], measures: Sequence[Measure]) -> str:
    """One row a language (and their average), one column a system and measure; scores × 100."""
    languages = list(systems[0].languages)
    rows = [*languages, AVERAGE] if len(languages) > 1 else languages
    header = ["language", "queries"]
    for measure in measures:
        header += [measure.label if len(systems) == 1 else f"{measure.label} {system.name}" for system in systems]
    body = []
    for lang in rows:
        counts = [len(next(iter(systems[0].languages[each].values.values()))) for each in languages]
        count = sum(counts) if lang == AVERAGE else counts[languages.index(lang)]
        cells = [points(system.mean(lang, measure)) for measure in measures for system in systems]
        body.append([lang, str(count), *cells])
    return markdown_table(header, body, "lr" + "r" * (len(header) - 2))


def test_table(comparisons: Sequence[Comparison], measures: Sequence[Measure]) -> str:
    """One row a test; scores × 100."""
    labels = {measure.key: measure.label for measure in measures}
    several = len({(c.baseline, c.system) for c in comparisons}) > 1
    first = comparisons[0]
    header = ["language", "measure", "queries"]
    header += ["baseline", "system", "before", "after"] if several else [first.baseline, first.system]
    header += ["difference", "95 % interval", "p", "p (Holm)", "better / worse / equal"]
    body = [
        [
            c.language, labels[c.measure], str(c.queries), *([c.baseline, c.system] if several else []),
            points(c.baseline_mean), points(c.system_mean), signed_points(c.difference),
            f"{signed_points(c.low)} to {signed_points(c.high)}", p_text(c.p_value), p_text(c.p_holm),
            f"{c.better} / {c.worse} / {c.equal}",
        ]
        for c in comparisons
    ]  # fmt: skip
    return markdown_table(header, body, "llr" + ("ll" if several else "") + "rrrrrrr")


def write_comparison(
    folder: PathLike,
    systems: Sequence[System],
    measures: Sequence[Measure],
    comparisons: Sequence[Comparison],
    texts: Texts,
    record: dict[str, Any],
) -> str:
    """Write comparison.json, comparison.md, per_query.tsv and comparison.png into ``folder``.

    :param record: what else the JSON file shall carry (arguments, provenance, where runs came from).
    :returns: what an entry point prints: tables, the queries that changed most, paths.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "comparison.json", _as_json(systems, measures, comparisons, record))
        write_per_query(folder / "per_query.tsv", systems, measures, texts)
        plot_comparison(folder / "comparison.png", systems, measures, comparisons)
        text = comparison_text(systems, measures, comparisons)
        with atomic_open(folder / "comparison.md") as stream:
            stream.write(f"# {systems[0].name} and {', '.join(s.name for s in systems[1:])}\n\n{text}\n")
            stream.write("\n![Comparison](comparison.png)\n\n" + changed_queries(systems, measures[0], texts) + "\n")
    except OSError as error:
        raise DataError(f"{folder}: the comparison cannot be written there: {error.strerror}") from error
    # More systems than two would fill the terminal; the file has them all.
    changed = changed_queries(systems[:2], measures[0], texts, details=False)
    return "\n".join([
        text, "", changed, "",
        f"tables, with passages: {folder / 'comparison.md'}", f"every query:           {folder / 'per_query.tsv'}",
        f"with provenance:       {folder / 'comparison.json'}", f"chart:                 {folder / 'comparison.png'}",
    ])  # fmt: skip


def comparison_text(systems: Sequence[System], measures: Sequence[Measure], comparisons: Sequence[Comparison]) -> str:
    """The tables, and one line on how to read them."""
    parts = [] if len(systems) == 2 else [score_table(systems, measures), ""]
    parts += [test_table(comparisons, measures), ""]
    tests = "the test" if len(comparisons) == 1 else f"all {len(comparisons)} tests of this table"
    parts.append(
        "Scores × 100. Two-sided paired randomisation test over queries; Holm's correction over "
        f"{tests}; bootstrap interval of the difference."
    )
    return "\n".join(parts)


def _as_json(
    systems: Sequence[System], measures: Sequence[Measure], comparisons: Sequence[Comparison], record: dict[str, Any]
) -> dict[str, Any]:
    languages = list(systems[0].languages)
    rows = [*languages, AVERAGE] if len(languages) > 1 else languages
    results = {s.name: {lang: {m.key: s.mean(lang, m) for m in measures} for lang in rows} for s in systems}
    return {"results": results, "comparisons": [asdict(c) for c in comparisons], **record}


def write_per_query(path: PathLike, systems: Sequence[System], measures: Sequence[Measure], texts: Texts) -> None:
    """Every judged query's values (0 to 1) and rank of the first relevant passage, tab-separated, one header line."""
    header = ["language", "qid"]
    header += [f"{measure.key}:{system.name}" for measure in measures for system in systems]
    header += [f"first_relevant:{system.name}" for system in systems] + ["query"]
    with atomic_open(path) as stream:
        stream.write("\t".join(header) + "\n")
        for lang, scores in systems[0].languages.items():
            for qid in scores.first_relevant:
                cells = [f"{s.languages[lang].values[m.key][qid]:.6f}" for m in measures for s in systems]
                ranks = [s.languages[lang].first_relevant[qid] for s in systems]
                cells += ["" if rank is None else str(rank) for rank in ranks]
                query = " ".join(texts.queries.get(lang, {}).get(qid, "").split())
                stream.write("\t".join([lang, qid, *cells, query]) + "\n")


def changed_queries(systems: Sequence[System], measure: Measure, texts: Texts, details: bool = True) -> str:
    """The queries that gained and lost most on ``measure`` between the first system and each other.

    :param details: with the texts of the relevant passage and of both first hits, where the corpus is at hand.
    """
    parts = []
    for system in systems[1:]:
        for title, sign in (("gained", 1), ("lost", -1)):
            chosen = _most_changed(systems[0], system, measure, sign)
            pair = f"{measure.label}, {systems[0].name} → {system.name}"
            if not chosen:
                parts += [f"No query {title} ({pair}).", ""]
                continue
            parts += [f"{'##' if details else ''} Queries that {title} most ({pair})".strip(), ""]
            parts += [_changed_table(systems[0], system, chosen, measure, texts), ""]
            if details and texts.passages is not None:
                parts += [_passages(systems[0], system, chosen, texts), ""]
    return "\n".join(parts).rstrip()


def _most_changed(base: System, system: System, measure: Measure, sign: int) -> list[tuple[str, str]]:
    """``(language, qid)`` of the largest changes in one direction, a few of each language.

    Of equal changes in the measure, the one that moved the first relevant passage further comes first.
    """
    limit = max(2, -(-_EXTREMES // len(base.languages)))
    chosen = []
    for lang, scores in base.languages.items():
        other = system.languages[lang]
        changes = []
        for qid, value in scores.values[measure.key].items():
            difference = sign * (other.values[measure.key][qid] - value)
            if difference > 0:
                before, after = (
                    1 / rank if rank else 0.0 for rank in (scores.first_relevant[qid], other.first_relevant[qid])
                )
                changes.append((-difference, sign * (before - after), qid))
        chosen += [(lang, qid) for _, _, qid in sorted(changes)[:limit]]
    return chosen


def _changed_table(
    base: System, system: System, chosen: Sequence[tuple[str, str]], measure: Measure, texts: Texts
) -> str:
    rows = []
    for lang, qid in chosen:
        values = [s.languages[lang].values[measure.key][qid] for s in (base, system)]
        ranks = [s.languages[lang].first_relevant[qid] for s in (base, system)]
        query = texts.queries.get(lang, {}).get(qid, "")
        change = f"{points(values[0])} → {points(values[1])}"
        rank = " → ".join("none" if r is None else str(r) for r in ranks)
        rows.append([lang, qid, change, rank, shorten(query, 70)])
    return markdown_table(["language", "qid", measure.label, "first relevant at rank", "query"], rows, "llrrl")


def _passages(base: System, system: System, chosen: Sequence[tuple[str, str]], texts: Texts) -> str:
    assert texts.passages is not None
    wanted: dict[str, dict[str, tuple[str, str | None, str | None]]] = {}
    for lang, qid in chosen:
        judged = texts.qrels[lang][qid]
        relevant = max(judged, key=lambda docid: judged[docid])
        tops = [s.languages[lang].top[qid] for s in (base, system)]
        wanted.setdefault(lang, {})[qid] = (relevant, tops[0], tops[1])
    found = {
        lang: texts.passages(lang, {docid for trio in trios.values() for docid in trio if docid is not None})
        for lang, trios in wanted.items()
    }
    lines = []
    for lang, qid in chosen:
        lines.append(f"- {lang} {qid}: {texts.queries.get(lang, {}).get(qid, '')}")
        labels = ("relevant", f"first hit of {base.name}", f"first hit of {system.name}")
        for label, docid in zip(labels, wanted[lang][qid], strict=True):
            if docid is not None:
                grade = "" if label == "relevant" or texts.qrels[lang][qid].get(docid, 0) < 1 else ", relevant"
                text = shorten(found[lang].get(docid, "not in the corpus"), 200)
                lines.append(f"    - {label} (`{docid}`{grade}): {text}")
    return "\n".join(lines)
