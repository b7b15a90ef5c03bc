"""Some rows of training files, drawn by a seed: ``python -m FlagEmbedding.mining.sample``.

The files are read twice: to check and count, then to pick. The rows keep their order and stay as they are. Memory: one
number a drawn row.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from FlagEmbedding.mining.common.jobs import Job, Progress, check_output
from FlagEmbedding.mining.merge import checked_files, valid_rows
from FlagEmbedding.utils.cli import Parser, add_bool_flag, entry_point
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import fingerprints


def draw(total: int, number: int, seed: int) -> list[int]:
    """``number`` of the places 0 … ``total`` − 1, ascending."""
    # Seeding by text goes through SHA-512, the same on every platform.
    return sorted(random.Random(f"{seed}").sample(range(total), number))


def sample(
    inputs: Sequence[str],
    output: Path,
    number: int | None,
    share: float | None,
    seed: int = 42,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Draw ``number`` rows, or that ``share`` of them; returns the numbers drawn and there. Raises ``UserError``."""
    check_output(output, overwrite)
    files = checked_files(inputs)
    total = sum(1 for _ in valid_rows(files))
    wanted = number if number is not None else round((share or 0.0) * total)
    if not 1 <= wanted <= total:
        raise UsageError(f"{wanted} rows asked for, there are {total}: give a number from 1 to {total}")
    identity = {"inputs": [file["sha256"] for file in fingerprints(files)], "number": wanted, "seed": seed}
    with Job(output, identity, overwrite=overwrite) as job:
        places = draw(total, wanted, seed)[job.done :]
        progress, position = Progress("rows", wanted, job.done), 0
        rows = valid_rows(files)
        for place in places:
            row, _ = next(islice(rows, place - position, None))
            position = place + 1
            job.add([row])
            progress.step()
        job.finish()
    return wanted, total


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and draw."""
    parser = Parser("Some rows of training files, drawn by a seed.")
    parser.add_argument("--input_file", nargs="+", required=True, metavar="PATH", help="files, or folders of them")
    parser.add_argument("--output_file", required=True, metavar="FILE", help="the drawn rows")
    parser.add_argument("--number", type=int, help="rows to draw")
    parser.add_argument("--share", type=float, help="instead: the share of all rows, such as 0.1")
    parser.add_argument("--seed", type=int, default=42, help="decides which")
    add_bool_flag(parser, "--overwrite", help="replace an output that is there")
    a = parser.parse_args(argv)
    if (a.number is None) == (a.share is None):
        raise UsageError("give either --number or --share")
    if a.share is not None and not 0 < a.share <= 1:
        raise UsageError(f"--share must lie above 0 and at most at 1, got {a.share:g}")
    drawn, total = sample(a.input_file, Path(a.output_file), a.number, a.share, a.seed, a.overwrite)
    print(f"{a.output_file}: {drawn:,} of {total:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
