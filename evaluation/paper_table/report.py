"""The reproduced table as Markdown, JSON and chart: mean and spread over seeds, tests, time, memory, paper's scores.

Tests compare two rows query by query, each query's value averaged over the seeds: they say whether a difference would
hold on other queries, for these trained models. What another seed would do is the spread; both are shown, and a line
says which of the two is larger.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.trec import read_qrels, read_run
from FlagEmbedding.evaluation.compare import compare_runs, score_run
from FlagEmbedding.evaluation.metrics import Measure, mean, parse_measures
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, LanguageScores, System
from FlagEmbedding.evaluation.tables import p_text, signed_points
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.pages import render
from paper_table.plan import Cell, Options, Row, Table
from paper_table.plot import plot_table

_PAGE = Path(__file__).with_name("table.md.j2")


@dataclass(frozen=True)
class RowScores:
    """A row's scores of every seed (0 to 1): ``values[lang][measure key]``, one number per seed, in seed order.

    With several languages ``average`` stands for the mean of theirs, seed by seed.
    """

    row: Row
    seeds: list[int | None]
    values: dict[str, dict[str, list[float]]]
    system: System  # values of single queries, averaged over seeds

    @property
    def name(self) -> str:
        return self.row.name


def write_table(
    options: Options, table: Table, cells: Sequence[Cell], records: dict[str, dict[str, Any]], qrels: dict[str, Path],
    resamples: int, origin: dict[str, Any],
) -> str:  # fmt: skip
    """Write table.md, table.json and table.png into the output folder; returns what an entry point prints."""
    measures, folder = parse_measures(options.metrics), options.output_dir
    rows = collect(options, cells, qrels, measures)
    languages = list(rows[0].values)
    models = {row.name: {c.id: records[c.id] for c in cells if c.row.name == row.name} for row in rows}
    # On other models the paper's scores are shown for orientation, but not drawn onto the same axis.
    comparable = Path(options.base_model).name == table.published_model
    tests = compare_rows(rows, measures[0], resamples)
    values = {
        "base": Path(options.base_model).name, "languages": list(qrels), "split": options.split,
        "data": "MIRACL from the hub" if options.data_dir is None else f"`{options.data_dir.name}`",
        "scores": _scores(rows, measures, table), "source": table.source, "comparable": comparable,
        "seeds": max(len(row.seeds) for row in rows), "tested": measures[0].label, "folder": folder,
        "tests": [_test_line(test, {row.name: row for row in rows}) for test in tests],
        "costs": _costs({name: list(each.values()) for name, each in models.items()}),
        "seen": _seen([row for row in rows if row.row.recipe is not None], languages, measures[0]),
    }  # fmt: skip
    with atomic_open(folder / "table.md") as stream:
        stream.write(render(_PAGE, page=True, **values))
    value = {
        "rows": [_row_json(row, table, models[row.name]) for row in rows],
        "tests": [asdict(test) for test in tests],
        "tested_measure": measures[0].key, "published_source": table.source, **origin,
    }  # fmt: skip
    write_json_atomic(folder / "table.json", value)
    points = {row.name: row.values for row in rows}
    plot_table(folder / "table.png", points, languages, measures, table.published if comparable else {})
    return render(_PAGE, page=False, **values).rstrip()


def collect(
    options: Options, cells: Sequence[Cell], qrels: dict[str, Path], measures: Sequence[Measure]
) -> list[RowScores]:
    """Scores of all cells out of their run files, row by row in table order."""
    judged = {lang: read_qrels(path) for lang, path in qrels.items()}
    found: dict[str, dict[str, dict[int | None, LanguageScores]]] = {}
    for cell in cells:
        scores = score_run(judged[cell.lang], read_run(options.product(cell, "search")), measures)
        found.setdefault(cell.row.name, {}).setdefault(cell.lang, {})[cell.seed] = scores
    named = {cell.row.name: cell.row for cell in cells}
    return [_row_scores(named[name], languages, measures) for name, languages in found.items()]


def _row_scores(
    row: Row, languages: dict[str, dict[int | None, LanguageScores]], measures: Sequence[Measure]
) -> RowScores:
    seeds = list(next(iter(languages.values())))
    values = {
        lang: {m.key: [mean(by_seed[seed].values[m.key]) for seed in seeds] for m in measures}
        for lang, by_seed in languages.items()
    }
    if len(languages) > 1:
        by_key = {m.key: zip(*(values[lang][m.key] for lang in languages), strict=True) for m in measures}
        values[AVERAGE] = {key: [statistics.fmean(each) for each in by_seed] for key, by_seed in by_key.items()}
    averaged = System(row.name, {lang: _over_seeds(list(by_seed.values())) for lang, by_seed in languages.items()})
    return RowScores(row, seeds, values, averaged)


def _over_seeds(scores: list[LanguageScores]) -> LanguageScores:
    values = {
        key: {qid: statistics.fmean(each.values[key][qid] for each in scores) for qid in by_query}
        for key, by_query in scores[0].values.items()
    }
    return LanguageScores(values, {}, {})


def compare_rows(rows: Sequence[RowScores], measure: Measure, resamples: int) -> list[Comparison]:
    """Each row against the first, and each against the one above it; Holm over all of them."""
    if len(rows) < 2:
        return []
    pairs = [(0, place) for place in range(1, len(rows))] + [(place - 1, place) for place in range(2, len(rows))]
    return compare_runs([row.system for row in rows], [measure], pairs=pairs, resamples=resamples)


def _scores(rows: Sequence[RowScores], measures: Sequence[Measure], table: Table) -> dict[str, Any]:
    """One line per row, one column per language and measure; beside it the paper's where it has one."""
    headers, lines, languages = ["row"], [[row.name] for row in rows], list(rows[0].values)
    for lang, measure in product(languages, measures):
        headers.append(f"{lang} {measure.label}" if len(languages) > 1 else measure.label)
        published = [table.score(row.name, lang, measure.key) for row in rows]
        for line, row, there in zip(lines, rows, published, strict=True):
            line.append(spread(row.values[lang][measure.key]))
            if table.has(lang, measure.key):
                line.append("" if there is None else f"{there:.1f}")
        headers += ["paper"] * table.has(lang, measure.key)
    return {"headers": headers, "lines": lines}


def spread(values: Sequence[float]) -> str:
    """``63.2 ± 0.8`` (× 100, sample standard deviation), or the value alone."""
    middle = f"{100 * statistics.fmean(values):.1f}"
    return middle if len(values) < 2 else f"{middle} ± {100 * statistics.stdev(values):.1f}"


def _test_line(test: Comparison, rows: dict[str, RowScores]) -> list[str]:
    each = seed_differences(rows[test.system], rows[test.baseline], test.language, test.measure)
    return [
        test.language, test.system, test.baseline, signed_points(test.difference), ", ".join(map(signed_points, each)),
        f"{signed_points(test.low)} to {signed_points(test.high)}", p_text(test.p_value), p_text(test.p_holm),
    ]  # fmt: skip


def seed_differences(one: RowScores, other: RowScores, lang: str, measure: str) -> list[float]:
    """``one`` minus ``other`` for every seed of ``one``; a row without seeds stands against each of them."""
    theirs = dict(zip(other.seeds, other.values[lang][measure], strict=True))
    found = zip(one.seeds, one.values[lang][measure], strict=True)
    return [value - theirs.get(seed, theirs.get(None, 0.0)) for seed, value in found]


def _costs(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Time and memory of each row's commands; GPU memory where a GPU was seen."""
    with_gpu = any("peak_gpu_mb" in stage for each in records.values() for record in each for stage in record.values())
    columns = []
    for title, stage in (("training", "train"), ("embedding", "index")):
        columns += [(title, stage, "seconds"), ("memory", stage, "peak_rss_mb")]
        columns += [("GPU memory", stage, "peak_gpu_mb")] * with_gpu
    columns.append(("search", "search", "seconds"))
    lines = [
        [name, str(len(each)), *(_cost(each, stage, key) for _, stage, key in columns)]
        for name, each in records.items()
    ]
    return {"headers": ["row", "models", *(title for title, _, _ in columns)], "lines": lines}


def _cost(records: Sequence[dict[str, Any]], stage: str, key: str) -> str:
    values = [record[stage][key] for record in records if key in record.get(stage, {})]
    if not values:
        return ""
    return duration(statistics.fmean(values)) if key == "seconds" else f"{max(values) / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    """``70 s``, ``2.5 min`` or ``1 h 07 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"


def _seen(trained: Sequence[RowScores], languages: Sequence[str], measure: Measure) -> list[dict[str, Any]]:
    """Two sizes next to each other, per language: how far rows lie apart, and one row's seeds at most."""
    found = []
    for lang in languages if len(trained) > 1 else ():
        values = {row.name: row.values[lang][measure.key] for row in trained}
        means = {name: 100 * statistics.fmean(each) for name, each in values.items()}
        best, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        seeds = max((100 * (max(each) - min(each)) for each in values.values() if len(each) > 1), default=None)
        apart = means[best] - means[least]
        found.append({"lang": lang, "best": best, "least": least, "apart": apart, "seeds": seeds})
    return found


def _row_json(row: RowScores, table: Table, models: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    for lang, key in ((lang, key) for lang, by_measure in row.values.items() for key in by_measure):
        values, published = row.values[lang][key], table.score(row.name, lang, key)
        results.setdefault(lang, {})[key] = {
            "mean": statistics.fmean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": {"none" if seed is None else str(seed): v for seed, v in zip(row.seeds, values, strict=True)},
            "published": None if published is None else published / 100,
        }
    recipe = None if row.row.recipe is None else row.row.recipe.name
    return {"name": row.name, "recipe": recipe, "results": results, "models": models}
