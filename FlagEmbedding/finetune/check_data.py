"""The check of training data by itself: ``python -m FlagEmbedding.finetune.check_data PATH…``.

Reads what training would read, prints what each file holds and exits 0, or prints the problems (first 20 and their
number, each as file:line, key, what was found, what to do) and exits 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from FlagEmbedding.row_counts import FileStatistics, report_missing_scores, scan_file
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.cli import entry_point, option, parse, positional, switch
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class CheckArguments:
    """What is checked."""

    paths: list[str] = positional(
        "files or folders of rows (.jsonl, .json, .parquet …), saved datasets, ids of the hub"
    )
    knowledge_distillation: bool = switch(False, "check that teacher scores are there, in all rows of a file or none")
    train_group_size: int | None = option(None, "note rows that hold too few negatives for it")

    def __post_init__(self) -> None:
        if self.train_group_size is not None and self.train_group_size < 1:
            raise UsageError(f"--train_group_size must be at least 1, got {self.train_group_size}")


def check(options: CheckArguments) -> dict[str, FileStatistics]:
    """What each file holds, in the order of training. Raises ``DataError``: the problems."""
    problems = Problems()
    statistics: dict[str, FileStatistics] = {}
    for file in find_files(options.paths, problems):
        statistics[file.path] = scan_file(file.path, problems)
        if options.knowledge_distillation:
            report_missing_scores(file, statistics[file.path], problems)
    problems.raise_if_any()
    if options.knowledge_distillation and not any(counts.scored for counts in statistics.values()):
        hint = "add them, or leave --knowledge_distillation out"
        problems.report(next(iter(statistics)), 0, "", "no row has pos_scores and neg_scores", hint)
    problems.raise_if_any()
    return statistics


def describe(path: str, counts: FileStatistics, options: CheckArguments) -> list[str]:
    """A line for a file, and notes of what training will do with it that its owner may not expect."""
    line = f"{path}: {counts.rows} rows, {counts.negatives} negatives (at least {counts.fewest_negatives} a row)"
    line += f", neg_q for {counts.negatives_with_query} of them" if counts.with_neg_q else ""
    line += f", teacher scores in {counts.scored} rows" if counts.scored else ""
    lines, group = [line], options.train_group_size
    if group is not None and counts.fewest_negatives < group - 1:
        lines.append(f"  note: rows with fewer than {group - 1} negatives repeat them to fill a group of {group}")
    if counts.twins:
        lines.append(
            f"  note: {counts.twins} negatives read like a positive of their row (first: line {counts.first_twin}): "
            "take them out (python -m FlagEmbedding.mining doctor lists them)"
        )
    if options.knowledge_distillation and not counts.scored:
        lines.append("  note: no teacher scores: its batches train without distillation")
    return lines


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check, print."""
    (options,) = parse([CheckArguments], argv, __doc__ or "")
    statistics = check(options)
    for path, counts in statistics.items():
        print(*describe(path, counts, options), sep="\n")
    print(f"ok: {sum(counts.rows for counts in statistics.values())} rows in {len(statistics)} files")


if __name__ == "__main__":
    sys.exit(main())
