"""A grid's results as JSON lines, table and figure: each row's spread, difference, p, and what could be seen."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.chain import Cell, Chain
from experiments.grid import Grid
from experiments.statistics import Effect, effect
from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import read_qrels, read_run
from FlagEmbedding.evaluation.compare import score_run
from FlagEmbedding.evaluation.plots import GRAY, pyplot, save
from FlagEmbedding.evaluation.significance import holm
from FlagEmbedding.evaluation.tables import p_text, points, signed_points
from FlagEmbedding.utils.io import atomic_open, read_json, write_json_atomic
from FlagEmbedding.utils.pages import render
from FlagEmbedding.utils.provenance import provenance

_PAGE = Path(__file__).with_name("report.md.j2")
_BETTER, _WORSE = "#009e73", "#d55e00"
Values = dict[str, dict[str, float]]  # measure key → qid → value


def chosen(qid: str, share: float | None) -> bool:
    """Whether a query is of those that choices are made on: by its hash, so that every grid divides alike."""
    return share is None or int(hashlib.sha256(qid.encode()).hexdigest()[:13], 16) / 16**13 < share


def score(grid: Grid, chain: Chain, cell: Cell, say: bool) -> Values:
    """Values of the queries that are shown: those that choices are made on, or with ``say`` the others."""
    of = cell.scored_on
    qrels = read_qrels(miracl.qrels_file(of.language, of.split, of.data_dir), beir=None)
    kept = {qid: judged for qid, judged in qrels.items() if chosen(qid, grid.choose) != say}
    return score_run(kept, read_run(chain.score_stages(cell)[1].product), grid.measures).values


def write_report(grid: Grid, chain: Chain, records: dict[Cell, dict[str, Any]], say: bool) -> str:
    """Write results.jsonl, report.md and report.png of all cells that are done; returns the page."""
    folder = chain.output_dir
    scores = {cell: score(grid, chain, cell, say) for cell in records}
    origin = provenance()
    with atomic_open(folder / "results.jsonl") as stream:
        for cell, scored in scores.items():
            means = {key: statistics.fmean(by_query.values()) for key, by_query in scored.items()}
            line = {**_name(cell), "queries": len(next(iter(scored.values()))), **means, "held_out": say}
            print(json.dumps({**line, "stages": records[cell], "provenance": origin}, ensure_ascii=False), file=stream)
    tests = _tests(grid, scores)
    looked = _looked(folder, say)
    shown = {of.name: _scores(grid, scores, of.name) for of in grid.collections}
    values: dict[str, Any] = {
        "grid": grid.path.name, "base": Path(grid.base).name, "measures": grid.measures, "say": say, "looked": looked,
        "choose": grid.choose, "scores": {name: lines for name, lines in shown.items() if lines},
        "tests": [_line(*test) for test in tests], "seconds": _seconds(records),
    }  # fmt: skip
    page = render(_PAGE, **values)
    with atomic_open(folder / "report.md") as stream:
        stream.write(page)
    differences = [{**named, **asdict(found), "p_holm": p} for named, found, p in tests]
    write_json_atomic(folder / "report.json", {"tests": differences, "looked": looked, "provenance": origin})
    _draw(folder / "report.png", tests, grid)
    return page


def _name(cell: Cell) -> dict[str, Any]:
    made = None if cell.collection is None else cell.collection.name
    return {"row": cell.row.name, "trained_on": made, "seed": cell.seed, "scored_on": cell.scored_on.name}


def _tests(grid: Grid, scores: dict[Cell, Values]) -> list[tuple[dict[str, Any], Effect, float]]:
    """Every pair on every collection that both rows were scored on; Holm's correction over all of them."""
    key = grid.measures[0].key
    by_seed: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for cell, scored in scores.items():
        # The base is made for no collection and by no seed: it stands against each of them.
        made = [each.name for each in grid.collections] if cell.collection is None else [cell.collection.name]
        for name, seed in product(made, grid.seeds if cell.seed is None else [cell.seed]):
            by_seed.setdefault((cell.row.name, name, cell.scored_on.name), {})[seed] = scored[key]
    found: list[tuple[dict[str, Any], Effect]] = []
    for (before, after), trained, of in product(grid.pairs, grid.collections, grid.collections):
        one, other = (by_seed.get((name, trained.name, of.name), {}) for name in (before, after))
        rows = [(one[seed], other[seed]) for seed in grid.seeds if seed in one and seed in other]
        if rows:
            named = {"row": after, "against": before, "trained_on": trained.name, "scored_on": of.name}
            found.append((named, effect(np.array([[b[qid] - a[qid] for qid in a] for a, b in rows]))))
    corrected = holm([each.p for _, each in found])
    return [(named, each, p) for (named, each), p in zip(found, corrected, strict=True)]


def _scores(grid: Grid, scores: dict[Cell, Values], of: str) -> list[list[str]]:
    lines = []
    groups: dict[tuple[str, str], list[Values]] = {}
    for cell, values in scores.items():
        if cell.scored_on.name == of:
            groups.setdefault((cell.row.name, cell.collection.name if cell.collection else ""), []).append(values)
    for (row, made), each in groups.items():
        cells = []
        for measure in grid.measures:
            means = [100 * statistics.fmean(values[measure.key].values()) for values in each]
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.1f}{spread}")
        lines.append([row, made, str(len(each)), *cells])
    return lines


def _line(named: dict[str, Any], found: Effect, corrected: float) -> list[str]:
    return [
        named["row"], named["against"], named["trained_on"], named["scored_on"], signed_points(found.mean),
        f"{signed_points(found.low)} to {signed_points(found.high)}", p_text(found.p), p_text(corrected),
        points(found.detectable), "" if found.seeds_sd is None else points(found.seeds_sd),
        f"{found.seeds} × {found.queries}",
    ]  # fmt: skip


def _looked(folder: Path, say: bool) -> int:
    """How often the held-out queries of this grid have been looked at, this time counted."""
    path = folder / "looked.json"
    times = int(read_json(path)["times"]) if path.is_file() else 0
    if say:
        write_json_atomic(path, {"times": times + 1})
    return times + int(say)


def _seconds(records: dict[Cell, dict[str, Any]]) -> dict[str, float]:
    """Hours of all commands, each counted once: training, everything."""
    stages = {name: stage for record in records.values() for name, stage in record.items()}
    every = sum(stage.get("seconds", 0.0) for stage in stages.values())
    return {"commands": len(stages), "hours": every / 3600}


def _draw(path: Path, tests: Sequence[tuple[dict[str, Any], Effect, float]], grid: Grid) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.34 * max(1, len(tests))), layout="constrained")
    axes.axvline(0, color=GRAY, linewidth=1.2)
    for place, (_, found, corrected) in enumerate(reversed(tests)):
        color = (_BETTER if found.mean > 0 else _WORSE) if corrected < 0.05 else GRAY
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=color)
        axes.plot(100 * found.mean, place, "o", color=color)
    names = [f"{n['row']} − {n['against']}, {n['trained_on']} → {n['scored_on']}" for n, _, _ in reversed(tests)]
    axes.set_yticks(range(len(tests)), names, fontsize=8)
    axes.set_xlabel(f"difference in {grid.measures[0].label} × 100, 95 % interval over queries and seeds")
    save(figure, path)
    plt.close(figure)
