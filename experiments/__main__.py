"""Run a grid of experiments: ``python -m experiments GRID.yaml --output_dir DIR``, from the checkout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.chain import Cell, Chain
from experiments.grid import read_grid
from FlagEmbedding.utils.cli import entry_point, option, parse, positional, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.locking import exclusive


@dataclass(frozen=True)
class ExperimentArguments:
    """The grid."""

    grid: str = positional("YAML file of rows, seeds and collections (experiments/grid.py says how)", "GRID", None)
    output_dir: str = option(help="models, runs, records, logs, results.jsonl, report.md")
    rows: list[str] = option([], "some of the rows (what they are made of is made, too)")
    seeds: list[int] = option([], "some of the seeds")
    say: bool = switch(False, "report on the queries held out by `choose`; each such look is counted")
    report_only: bool = switch(False, "run nothing: report what is done")
    dry_run: bool = switch(False, "print the commands that are not done, and stop")


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done of a grid, then report."""
    arguments: ExperimentArguments = parse([ExperimentArguments], argv, "Run a grid of experiments.")[0]
    grid = read_grid(Path(arguments.grid))
    if arguments.say and grid.choose is None:
        raise UsageError(f"--say: {grid.path} holds no queries out; give it `choose: 0.5`")
    _check_names("rows", arguments.rows, [row.name for row in grid.rows])
    _check_names("seeds", arguments.seeds, grid.seeds)
    chain = Chain(grid, Path(arguments.output_dir).resolve())
    todo = [
        cell for cell in chain.cells()
        if (not arguments.rows or cell.row.name in arguments.rows)
        and (not arguments.seeds or cell.seed in (None, *arguments.seeds))
    ]  # fmt: skip
    if arguments.dry_run:
        print(*dict.fromkeys(shlex.join(stage.command) for cell in todo for stage in chain.missing(cell)), sep="\n")
        return
    with exclusive(chain.output_dir / "lock", chain.output_dir):
        print(_run(chain, todo, arguments))


def _check_names(flag: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    for each in given:
        if each not in known:
            raise UsageError(f"--{flag} {each}: choose from {', '.join(map(str, known))}")


def _run(chain: Chain, todo: list[Cell], arguments: ExperimentArguments) -> str:
    from experiments.report import write_report  # matplotlib and scipy are not needed to run

    records: dict[Cell, dict[str, Any]] = {}
    for number, cell in enumerate(todo, 1):
        if not arguments.report_only:
            records[cell] = chain.run(cell, f"{number}/{len(todo)}")
        elif not chain.missing(cell):
            records[cell] = chain.records(cell)
    if not records:
        raise UsageError(f"{chain.output_dir}: nothing of this grid is done")
    return write_report(chain.grid, chain, records, arguments.say)


if __name__ == "__main__":
    sys.exit(main())
