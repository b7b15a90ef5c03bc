"""Some rows of training files, drawn by a seed: ``python -m FlagEmbedding.mining.sample``.

The files are read twice: to check and count, then to pick. The rows keep their order and stay as they are. Memory: one
number per drawn row.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from FlagEmbedding.mining.common.options import OutputArguments
from FlagEmbedding.utils.cli import entry_point, option, parse
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class SampleArguments:
    """Rows."""

    input_file: list[str] = option(help="files, or folders of them", metavar="PATH")
    number: int | None = option(None, "rows to draw")
    share: float | None = option(None, "instead: the share of all rows, such as 0.1")
    seed: int = option(42, "decides which")

    def __post_init__(self) -> None:
        if (self.number is None) == (self.share is None):
            raise UsageError("give either --number or --share")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"--share must lie above 0 and at most at 1, got {self.share:g}")


def sample(given: SampleArguments, output: OutputArguments) -> tuple[int, int]:
    """Draw; returns the numbers of rows drawn and there. Raises ``UserError``."""
    from FlagEmbedding.mining.common.jobs import check_output, write_rows
    from FlagEmbedding.mining.common.rows import data_files, valid_rows
    from FlagEmbedding.schema import Problems

    check_output(output.path, output.overwrite)
    files, problems = data_files(given.input_file), Problems()
    total = sum(1 for _ in valid_rows(files, problems))
    problems.raise_if_any()
    wanted = given.number if given.number is not None else round((given.share or 0.0) * total)
    if not 1 <= wanted <= total:
        raise UsageError(f"{wanted} rows asked for, there are {total}: give a number from 1 to {total}")
    # Seeding by text goes through SHA-512, the same on every platform.
    drawn = frozenset(random.Random(f"{given.seed}").sample(range(total), wanted))
    picked = (row for place, (row, _) in enumerate(valid_rows(files, Problems())) if place in drawn)
    return write_rows(output.path, picked, output.overwrite), total


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and draw."""
    groups = (SampleArguments, OutputArguments)
    given, output = parse(groups, argv, "Some rows of training files, drawn by a seed.")
    drawn, total = sample(given, output)
    print(f"{output.output_file}: {drawn:,} of {total:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
