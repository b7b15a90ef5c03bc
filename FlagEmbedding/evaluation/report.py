"""Scores and comparisons for people: Markdown tables, a per-query file, the queries that changed most, a chart.

Files keep trec_eval's scale of 0 to 1; tables and charts show × 100 and say so. Query texts go into tables only,
since a plotting font seldom has every script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.trec import Qrels
from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.plots import plot_comparison
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, System
from FlagEmbedding.evaluation.tables import p_text, points, shorten, signed_points
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike, atomic_open, write_json_atomic
from FlagEmbedding.utils.pages import render, table

_PAGE = Path(__file__).with_name("comparison.md.j2")
_EXTREMES = 5  # queries shown of those that gained, and of those that lost most; at least 2 per language


@dataclass(frozen=True)
class Texts:
    """What single queries can be shown with.

    Attributes:
        queries: language -> qid -> query text; languages may be missing.
        qrels: language -> judgments.
        passages: (language, docids) -> docid -> text, or None where the corpus is not at hand.
    """

    queries: dict[str, dict[str, str]]
    qrels: dict[str, Qrels]
    passages: Callable[[str, set[str]], dict[str, str]] | None = None

    def query(self, lang: str, qid: str) -> str:
        """A query on one line; empty where its text is not known."""
        return " ".join(self.queries.get(lang, {}).get(qid, "").split())


def score_table(systems: Sequence[System], measures: Sequence[Measure]) -> str:
    """One line per language (and their average), one column per system and measure; scores × 100."""
    headers = ["language", "queries"]
    for measure in measures:
        headers += [measure.label if len(systems) == 1 else f"{measure.label} {system.name}" for system in systems]
    counts = {lang: len(scores.first_relevant) for lang, scores in systems[0].languages.items()}
    counts[AVERAGE] = sum(counts.values())
    lines = [
        [lang, str(counts[lang]), *(points(system.mean(lang, measure)) for measure in measures for system in systems)]
        for lang in systems[0].shown
    ]
    return table(headers, lines, range(1, len(headers)))


def test_table(comparisons: Sequence[Comparison], measures: Sequence[Measure]) -> str:
    """One line per test; scores × 100."""
    labels = {measure.key: measure.label for measure in measures}
    several = len({(c.baseline, c.system) for c in comparisons}) > 1
    names = ["baseline", "system", "before", "after"] if several else [comparisons[0].baseline, comparisons[0].system]
    headers = ["language", "measure", "queries", *names]
    headers += ["difference", "95 % interval", "p", "p (Holm)", "better / worse / equal"]
    lines = [
        [
            c.language, labels[c.measure], str(c.queries), *([c.baseline, c.system] if several else []),
            points(c.baseline_mean), points(c.system_mean), signed_points(c.difference),
            f"{signed_points(c.low)} to {signed_points(c.high)}", p_text(c.p_value), p_text(c.p_holm),
            f"{c.better} / {c.worse} / {c.equal}",
        ]
        for c in comparisons
    ]  # fmt: skip
    return table(headers, lines, [2, *range(5 if several else 3, len(headers))])


def write_comparison(
    folder: PathLike, systems: Sequence[System], measures: Sequence[Measure], comparisons: Sequence[Comparison],
    texts: Texts, record: dict[str, Any],
) -> str:  # fmt: skip
    """Write comparison.json, comparison.md, per_query.tsv and comparison.png into ``folder``.

    Args:
        record: what else the JSON file shall carry (arguments, provenance, where runs came from).

    Returns:
        What an entry point prints: the tables and the paths.
    """
    folder = Path(folder)
    results = {s.name: {lang: {m.key: s.mean(lang, m) for m in measures} for lang in s.shown} for s in systems}
    changes = changed_queries(systems, measures[0], texts)
    values = {
        "names": [system.name for system in systems], "tests": test_table(comparisons, measures),
        "scores": score_table(systems, measures) if len(systems) > 2 else "", "count": len(comparisons),
        "label": measures[0].label, "folder": folder,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        value = {"results": results, "comparisons": [asdict(c) for c in comparisons], **record}
        write_json_atomic(folder / "comparison.json", value)
        _write_per_query(folder / "per_query.tsv", systems, measures, texts)
        plot_comparison(folder / "comparison.png", systems, measures, comparisons)
        with atomic_open(folder / "comparison.md") as stream:
            stream.write(render(_PAGE, page=True, changes=changes, **values).rstrip() + "\n")
    except OSError as error:
        raise DataError(f"{folder}: the comparison cannot be written there: {error.strerror}") from error
    # The changes of more than two systems would fill the terminal; the file has them all.
    return render(_PAGE, page=False, changes=changes[:2], **values).rstrip()


def _write_per_query(path: Path, systems: Sequence[System], measures: Sequence[Measure], texts: Texts) -> None:
    """Every judged query's values (0 to 1) and rank of the first relevant passage, tab-separated, one header line."""
    header = ["language", "qid", *(f"{measure.key}:{system.name}" for measure in measures for system in systems)]
    header += [*(f"first_relevant:{system.name}" for system in systems), "query"]
    with atomic_open(path) as stream:
        stream.write("\t".join(header) + "\n")
        for lang, scores in systems[0].languages.items():
            for qid in scores.first_relevant:
                cells = [f"{s.languages[lang].values[m.key][qid]:.6f}" for m in measures for s in systems]
                cells += [str(s.languages[lang].first_relevant[qid] or "") for s in systems]
                stream.write("\t".join([lang, qid, *cells, texts.query(lang, qid)]) + "\n")


@dataclass(frozen=True)
class Change:
    """A query whose value differs between two systems.

    Attributes:
        values, ranks: before and after; the ranks of the first relevant passage, None where none was found.
        hits: what is shown of it -> docid: the passage of the highest grade, and both first hits.
    """

    lang: str
    qid: str
    values: list[float]
    ranks: list[int | None]
    hits: dict[str, str | None]


def changed_queries(systems: Sequence[System], measure: Measure, texts: Texts) -> list[dict[str, Any]]:
    """The queries that gained and lost most on ``measure`` between the first system and each other.

    Returns:
        Two per pair, gained and lost: ``title``, ``pair``, ``lines`` of a table, and ``passages`` to list where the
        corpus is at hand.
    """
    base = systems[0]
    chosen = [
        (title, system, most_changed((base, system), measure, texts.qrels, sign))
        for system in systems[1:]
        for title, sign in (("gained", 1), ("lost", -1))
    ]
    found: dict[str, dict[str, str]] = {}
    if texts.passages is not None:
        for lang in base.languages:
            shown = {docid for _, _, changes in chosen for c in changes if c.lang == lang for docid in c.hits.values()}
            found[lang] = texts.passages(lang, {docid for docid in shown if docid is not None})
    return [
        {
            "title": title,
            "pair": f"{measure.label}, {base.name} → {system.name}",
            "lines": [_line(change, texts) for change in changes],
            "passages": [(c, texts.query(c.lang, c.qid), _hits(c, texts, found[c.lang])) for c in changes if found],
        }
        for title, system, changes in chosen
    ]


def _line(change: Change, texts: Texts) -> list[str]:
    values, ranks = map(points, change.values), ("none" if rank is None else str(rank) for rank in change.ranks)
    query = shorten(texts.query(change.lang, change.qid), 70)
    return [change.lang, change.qid, " → ".join(values), " → ".join(ranks), query]


def _hits(change: Change, texts: Texts, found: dict[str, str]) -> list[tuple[str, str, bool, str]]:
    """What is shown of a query: what it is, docid, whether it is judged relevant, text."""
    judged = texts.qrels[change.lang][change.qid]
    return [
        (label, docid, judged.get(docid, 0) > 0, shorten(found.get(docid, "not in the corpus"), 200))
        for label, docid in change.hits.items()
        if docid is not None
    ]


def most_changed(pair: tuple[System, System], measure: Measure, qrels: dict[str, Qrels], sign: int) -> list[Change]:
    """The largest changes in one direction (1: gained, -1: lost), a few of each language.

    Of equal changes in the measure, the one that moved the first relevant passage further comes first.
    """
    limit = max(2, -(-_EXTREMES // len(pair[0].languages)))
    chosen = []
    for lang, judgments in qrels.items():
        scores = [(system.name, system.languages[lang]) for system in pair]
        changes = []
        for qid, judged in judgments.items():
            before, after = values = [each.values[measure.key][qid] for _, each in scores]
            if sign * (after - before) > 0:
                ranks = [each.first_relevant[qid] for _, each in scores]
                first, then = (1 / rank if rank else 0.0 for rank in ranks)
                hits: dict[str, str | None] = {"relevant": max(judged, key=lambda docid: judged[docid])}
                hits |= {f"first hit of {name}": each.top[qid] for name, each in scores}
                order = sign * (before - after), sign * (first - then), qid
                changes.append((order, Change(lang, qid, values, ranks, hits)))
        chosen += [change for _, change in sorted(changes, key=lambda each: each[0])[:limit]]
    return chosen
