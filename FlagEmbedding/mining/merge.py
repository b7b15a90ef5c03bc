"""Several training files as one, without repeated rows: ``python -m FlagEmbedding.mining.merge``.

Rows come in the order of the files and stay as they are; each file is read once. A row that says what an earlier one
said (query, positives and negatives are the same texts, in any order) is left out; ``--keep_repeated`` keeps it. What
has been seen is kept on disk, so memory does not grow with the files.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from FlagEmbedding.mining.common.options import OutputArguments
from FlagEmbedding.utils.cli import entry_point, option, parse, switch


@dataclass(frozen=True)
class MergeArguments:
    """Rows."""

    input_file: list[str] = option(help="files, or folders of them", metavar="PATH")
    keep_repeated: bool = switch(False, "keep rows that say the same as an earlier one")


def merge(given: MergeArguments, output: OutputArguments) -> Counter[str]:
    """Merge; returns how many rows were ``kept`` and ``repeated``. Raises ``UserError``."""
    from FlagEmbedding.mining.common.jobs import write_rows
    from FlagEmbedding.mining.common.rows import KeySet, data_files, row_key, valid_rows
    from FlagEmbedding.schema import Problems

    counts = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        problems, seen = Problems(), KeySet()
        for row, record in valid_rows(data_files(given.input_file), problems):
            new = seen.add(row_key(record)) or given.keep_repeated
            counts["kept" if new else "repeated"] += 1
            if new:
                yield row
        problems.raise_if_any()  # before the file appears

    write_rows(output.path, rows(), output.overwrite)
    return counts


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and merge."""
    groups = (MergeArguments, OutputArguments)
    given, output = parse(groups, argv, "Several training files as one, without repeated rows.")
    counts = merge(given, output)
    print(f"{output.output_file}: {counts['kept']:,} rows, {counts['repeated']:,} repeated ones left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
