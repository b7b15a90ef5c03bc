"""The check of training data by itself: ``python -m FlagEmbedding.finetune.check_data PATH…``.

Reads what training would read, prints what each file holds and exits 0, or prints the problems (first 20 and their
number, each as file:line, key, what was found, what to do) and exits 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from FlagEmbedding.finetune.store import FileStatistics, report_missing_scores, scan_file
from FlagEmbedding.schema import Problem, Problems, find_files
from FlagEmbedding.utils.cli import add_bool_flag, entry_point
from FlagEmbedding.utils.errors import UsageError


def check(
    paths: Sequence[str], knowledge_distillation: bool = False, train_group_size: int | None = None
) -> dict[str, FileStatistics]:
    """What each file holds, in the order of training.

    Args:
        paths: folders and files, as for ``--train_data``.
        knowledge_distillation: teacher scores are needed, in all rows of a file or in none, and in some file.
        train_group_size: only checked to make sense; ``notes`` uses it.

    Raises:
        DataError: the problems.
    """
    if train_group_size is not None and train_group_size < 1:
        raise UsageError(f"--train_group_size must be at least 1, got {train_group_size}")
    problems = Problems()
    statistics: dict[str, FileStatistics] = {}
    for file in find_files(paths, problems):
        statistics[file.path] = scan_file(file.path, problems)
        if knowledge_distillation:
            report_missing_scores(file, statistics[file.path], problems)
    problems.raise_if_any()
    if knowledge_distillation and not any(counts.scored for counts in statistics.values()):
        cure = "add them, or leave --knowledge_distillation out"
        problems.add(Problem(next(iter(statistics)), 0, "", "no row has pos_scores and neg_scores", cure))
        problems.raise_if_any()
    return statistics


def describe(path: str, counts: FileStatistics) -> str:
    """One line for a file."""
    line = f"{path}: {counts.rows} rows, {counts.negatives} negatives (at least {counts.fewest_negatives} a row)"
    if counts.with_neg_q:
        line += f", neg_q for {counts.negatives_with_query} of them"
    if counts.scored:
        line += f", teacher scores in {counts.scored} rows"
    return line


def notes(counts: FileStatistics, knowledge_distillation: bool, train_group_size: int | None) -> list[str]:
    """What training will do with a file that its owner may not expect."""
    found = []
    if train_group_size is not None and counts.fewest_negatives < train_group_size - 1:
        found.append(
            f"rows with fewer than {train_group_size - 1} negatives repeat them to fill a group of {train_group_size}"
        )
    if knowledge_distillation and not counts.scored:
        found.append("no teacher scores: its batches train without distillation")
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m FlagEmbedding.finetune.check_data", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a folder of .json/.jsonl files, or such a file")
    add_bool_flag(parser, "--knowledge_distillation", help="check that teacher scores are there")
    parser.add_argument("--train_group_size", type=int, help="note rows that hold too few negatives for it")
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check, print."""
    options = build_parser().parse_args(argv)
    statistics = check(options.paths, options.knowledge_distillation, options.train_group_size)
    for path, counts in statistics.items():
        print(describe(path, counts))
        for note in notes(counts, options.knowledge_distillation, options.train_group_size):
            print(f"  note: {note}")
    print(f"ok: {sum(counts.rows for counts in statistics.values())} rows in {len(statistics)} files")


if __name__ == "__main__":
    sys.exit(main())
