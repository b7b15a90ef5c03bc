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
from FlagEmbedding.utils.cli import entry_point, option, parse_whole, switch


@dataclass(frozen=True)
class MergeArguments:
    """Rows."""

    input_file: list[str] = option(help="files, or folders of them", metavar="PATH")
    keep_repeated: bool = switch(False, "keep rows that say the same as an earlier one")


@dataclass(frozen=True)
class MergeOptions:
    """Everything that the command line says."""

    rows: MergeArguments
    output: OutputArguments


def merge(options: MergeOptions) -> Counter[str]:
    """Merge; returns how many rows were ``kept`` and ``repeated``. Raises ``UserError``."""
    from FlagEmbedding.mining.common.jobs import check_output, write_rows
    from FlagEmbedding.mining.common.rows import KeySet, data_files, row_key, valid_rows
    from FlagEmbedding.schema import Problems

    output, counts = options.output, Counter[str]()
    check_output(output.path, output.overwrite)
    files = data_files(options.rows.input_file)

    def rows() -> Iterator[dict[str, Any]]:
        problems, seen = Problems(), KeySet()
        for row, record in valid_rows(files, problems):
            new = seen.add(row_key(record)) or options.rows.keep_repeated
            counts["kept" if new else "repeated"] += 1
            if new:
                yield row
        problems.raise_if_any()  # before the file appears

    write_rows(output.path, rows())
    return counts


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and merge."""
    options = parse_whole(MergeOptions, argv, "Several training files as one, without repeated rows.")
    counts = merge(options)
    print(f"{options.output.output_file}: {counts['kept']:,} rows, {counts['repeated']:,} repeated ones left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
