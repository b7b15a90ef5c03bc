"""The reproduced table as Markdown, JSON and chart: mean and spread over seeds, tests, time, memory, paper's scores.

Tests compare two rows query by query, each query's value averaged over the seeds: they say whether a difference would
hold on other queries, for these trained models. What another seed would do is the spread; both are shown, and a line
says which of the two is larger.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.collections.trec import read_qrels, read_run
from FlagEmbedding.evaluation.compare import compare_runs, score_run
from FlagEmbedding.evaluation.metrics import Measure, mean
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, LanguageScores, System
from FlagEmbedding.evaluation.tables import markdown_table, p_text, signed_points
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from paper_table.plan import STAGES, Cell, Options, Row, Table
from paper_table.plot import plot_table


@dataclass(frozen=True)
class RowScores:
    """A row's scores of every seed (0 to 1): ``values[lang][measure key]``, one number a seed, in seed order.

    With several languages ``average`` stands for the mean of theirs, seed by seed.
    """

    row: Row
    seeds: list[int | None]
    values: dict[str, dict[str, list[float]]]
    system: System  # values of single queries, averaged over seeds


def write_table(
    options: Options,
    table: Table,
    cells: Sequence[Cell],
    records: dict[str, dict[str, Any]],
    qrels: dict[str, Path],
    measures: Sequence[Measure],
    resamples: int,
    origin: dict[str, Any],
) -> str:
    """Write table.md, table.json and table.png into the output folder; returns what an entry point prints."""
    rows = collect(options, cells, qrels, measures)
    languages = list(rows[0].values)
    # On other models the paper's scores are shown for orientation, but not drawn onto the same axis.
    comparable = Path(options.base_model).name == table.published_model
    tests = compare_rows(rows, measures[0], resamples)
    text = "\n\n".join([
        _scores_text(rows, languages, measures, table, comparable), _tests_text(rows, tests, measures[0]),
        _costs_text(rows, cells, records), _seen_text(rows, languages, measures[0]),
    ])  # fmt: skip
    folder = options.output_dir
    with atomic_open(folder / "table.md") as stream:
        stream.write(
            f"# The paper's table, reproduced\n\n{_setting(options, languages)}\n\n{text}\n\n![Table](table.png)\n"
        )
    value = {
        "rows": [_row_json(row, cells, records, table) for row in rows],
        "tests": [asdict(test) for test in tests],
        "tested_measure": measures[0].key,
        "published_source": table.source,
        **origin,
    }
    write_json_atomic(folder / "table.json", value)
    points = {row.row.name: row.values for row in rows}
    plot_table(folder / "table.png", points, languages, measures, table.published if comparable else {})
    paths = [
        f"{name}: {folder / f'table.{suffix}'}"
        for name, suffix in (("table", "md"), ("data", "json"), ("chart", "png"))
    ]
    return "\n".join([text, "", *paths])


def collect(
    options: Options, cells: Sequence[Cell], qrels: dict[str, Path], measures: Sequence[Measure]
) -> list[RowScores]:
    """Scores of all cells out of their run files, row by row in table order."""
    judged = {lang: read_qrels(path) for lang, path in qrels.items()}
    found: dict[str, dict[str, dict[int | None, LanguageScores]]] = {}
    named: dict[str, Row] = {}
    for cell in cells:
        scores = score_run(judged[cell.lang], read_run(options.run_file(cell)), measures)
        found.setdefault(cell.row.name, {}).setdefault(cell.lang, {})[cell.seed] = scores
        named[cell.row.name] = cell.row
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
        values[AVERAGE] = {
            m.key: [statistics.fmean(values[lang][m.key][place] for lang in languages) for place in range(len(seeds))]
            for m in measures
        }
    system = System(row.name, {lang: _over_seeds(list(by_seed.values())) for lang, by_seed in languages.items()})
    return RowScores(row, seeds, values, system)


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


def _setting(options: Options, languages: Sequence[str]) -> str:
    data = "MIRACL from the hub" if options.data_dir is None else f"`{options.data_dir.name}`"
    named = ", ".join(lang for lang in languages if lang != AVERAGE)
    return f"Base model `{Path(options.base_model).name}`, data {data} ({named}), {options.split} queries."


def _scores_text(
    rows: Sequence[RowScores], languages: Sequence[str], measures: Sequence[Measure], table: Table, comparable: bool
) -> str:
    columns = [(lang, measure) for lang in languages for measure in measures]
    header, align = ["row"], "l"
    for lang, measure in columns:
        header.append(f"{lang} {measure.label}" if len(languages) > 1 else measure.label)
        align += "r"
        if _published_column(table, lang, measure):
            header.append("paper")
            align += "r"
    body = []
    for row in rows:
        cells = [row.row.name]
        for lang, measure in columns:
            cells.append(spread(row.values[lang][measure.key]))
            if _published_column(table, lang, measure):
                there = table.published.get(row.row.name, {}).get(lang, {}).get(measure.key)
                cells.append("" if there is None else f"{there:.1f}")
        body.append(cells)
    seeds = max((len(row.seeds) for row in rows), default=1)
    how = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    where = f", {languages[0]}" if len(languages) == 1 else ""
    if "paper" in header:
        paper = f"paper: {table.source}" + ("." if comparable else "; not this model and data.")
    else:
        paper = "The paper gives no score for these."
    return f"## Scores\n\n{markdown_table(header, body, align)}\n\nScores × 100{where}, {how}. {paper}"


def _published_column(table: Table, lang: str, measure: Measure) -> bool:
    return any(measure.key in scores.get(lang, {}) for scores in table.published.values())


def spread(values: Sequence[float]) -> str:
    """``63.2 ± 0.8`` (× 100, sample standard deviation), or the value alone."""
    middle = f"{100 * statistics.fmean(values):.1f}"
    return middle if len(values) < 2 else f"{middle} ± {100 * statistics.stdev(values):.1f}"


def _tests_text(rows: Sequence[RowScores], tests: Sequence[Comparison], measure: Measure) -> str:
    if not tests:
        return "## Differences\n\nOne row: nothing to compare."
    by_name = {row.row.name: row for row in rows}
    body = []
    for test in tests:
        one, other = by_name[test.system], by_name[test.baseline]
        seeds = ", ".join(signed_points(d) for d in seed_differences(one, other, test.language, measure))
        interval = f"{signed_points(test.low)} to {signed_points(test.high)}"
        body.append([
            test.language, test.system, test.baseline, signed_points(test.difference), seeds, interval,
            p_text(test.p_value), p_text(test.p_holm),
        ])  # fmt: skip
    header = ["language", "row", "against", "difference", "each seed", "95 % interval", "p", "p (Holm)"]
    return (
        f"## Differences in {measure.label}\n\n{markdown_table(header, body, 'lllrrrrr')}\n\n"
        "Scores × 100. Two-sided paired randomisation test over queries (each averaged over seeds), Holm's correction "
        f"over all {len(tests)} tests. It speaks of other queries, not of other seeds: for those see the spread."
    )


def seed_differences(one: RowScores, other: RowScores, lang: str, measure: Measure) -> list[float]:
    """``one`` minus ``other`` for every seed of ``one``; a row without seeds stands against each of them."""
    theirs = dict(zip(other.seeds, other.values[lang][measure.key], strict=True))
    found = zip(one.seeds, one.values[lang][measure.key], strict=True)
    return [value - theirs.get(seed, theirs.get(None, 0.0)) for seed, value in found]


def _costs_text(rows: Sequence[RowScores], cells: Sequence[Cell], records: dict[str, dict[str, Any]]) -> str:
    body = []
    with_gpu = any("peak_gpu_mb" in stage for record in records.values() for stage in record.values())
    for row in rows:
        mine = [records[cell.id] for cell in cells if cell.row.name == row.row.name]
        line = [row.row.name, str(len(mine))]
        for stage in STAGES[:3]:
            line.append(_mean_of(mine, stage, "seconds", _duration))
            if stage != "search":
                line.append(_max_of(mine, stage, "peak_rss_mb"))
                if with_gpu:
                    line.append(_max_of(mine, stage, "peak_gpu_mb"))
        body.append(line)
    gpu = ["GPU memory"] if with_gpu else []
    header = ["row", "models", "training", "memory", *gpu, "embedding", "memory", *gpu, "search"]
    return (
        f"## Time and memory\n\n{markdown_table(header, body, 'l' + 'r' * (len(header) - 1))}\n\n"
        "Time: mean of a model's command, start to end. Memory: the most that any of them held (resident)."
    )


def _mean_of(records: Sequence[dict[str, Any]], stage: str, key: str, show: Any) -> str:
    values = [record[stage][key] for record in records if key in record.get(stage, {})]
    return show(statistics.fmean(values)) if values else ""


def _max_of(records: Sequence[dict[str, Any]], stage: str, key: str) -> str:
    values = [record[stage][key] for record in records if key in record.get(stage, {})]
    return f"{max(values) / 1024:.1f} GiB" if values else ""


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"


def _seen_text(rows: Sequence[RowScores], languages: Sequence[str], measure: Measure) -> str:
    """What the numbers show, in words that no reader has to take on trust: two sizes next to each other."""
    trained = [row for row in rows if row.row.recipe is not None]
    if len(trained) < 2:
        return "## What is seen\n\nFewer than two trained rows: nothing to say about their differences."
    lines = []
    for lang in languages:
        means = {row.row.name: 100 * statistics.fmean(row.values[lang][measure.key]) for row in trained}
        best, least = max(means, key=lambda n: means[n]), min(means, key=lambda n: means[n])
        apart = means[best] - means[least]
        text = f"- {lang}: the trained rows lie {apart:.1f} points of {measure.label} apart "
        text += f"({least} lowest, {best} highest)"
        ranges = [100 * (max(v) - min(v)) for row in trained if len(v := row.values[lang][measure.key]) > 1]
        if ranges:
            text += f"; one row alone differs by up to {max(ranges):.1f} between its seeds"
            text += ". " + (
                "Order among the trained rows is therefore not told by these seeds."
                if max(ranges) >= apart
                else f"The furthest differ by more than seeds do; rows within {max(ranges):.1f} are not told apart."
            )
        else:
            text += "; with one seed a row, nothing tells this from the luck of a seed."
        lines.append(text)
    return "## What is seen\n\n" + "\n".join(lines)


def _row_json(
    row: RowScores, cells: Sequence[Cell], records: dict[str, dict[str, Any]], table: Table
) -> dict[str, Any]:
    results = {
        lang: {
            key: {
                "mean": statistics.fmean(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": {"none" if s is None else str(s): v for s, v in zip(row.seeds, values, strict=True)},
                "published": _published(table, row.row.name, lang, key),
            }
            for key, values in by_measure.items()
        }
        for lang, by_measure in row.values.items()
    }
    mine = {cell.id: records[cell.id] for cell in cells if cell.row.name == row.row.name}
    recipe = None if row.row.recipe is None else row.row.recipe.name
    return {"name": row.row.name, "recipe": recipe, "results": results, "models": mine}


def _published(table: Table, row: str, lang: str, key: str) -> float | None:
    value = table.published.get(row, {}).get(lang, {}).get(key)
    return None if value is None else value / 100
