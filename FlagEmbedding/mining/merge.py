"""Several training files as one, without repeated rows: ``python -m FlagEmbedding.mining.merge``.

Rows come in the order of the files and stay as they are. A row that says what an earlier one said (query, positives and
negatives are the same texts, in any order) is left out; ``--keep_repeated`` keeps it. What has been seen is kept on
disk, so memory does not grow with the files.
"""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.mining.common.jobs import Job, Progress, check_output
from FlagEmbedding.mining.common.queries import parse_pairs
from FlagEmbedding.schema import Problems, TrainRecord, find_files, read_rows
from FlagEmbedding.utils.cli import Parser, add_bool_flag, entry_point
from FlagEmbedding.utils.identity import fingerprints


class KeySet:
    """Which keys were added; on disk, in a file that vanishes with the process."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("")
        self._db.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: bytes) -> bool:
        """True when ``key`` is new."""
        return self._db.execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount == 1


def row_key(record: TrainRecord) -> bytes:
    """Sixteen bytes that are equal for rows that say the same."""
    parts = [text_key(record.query), b"+", *sorted(map(text_key, record.pos)), b"-", *sorted(map(text_key, record.neg))]
    return blake2b(b"".join(parts), digest_size=16).digest()


def valid_rows(files: Sequence[Path], problems: Problems | None = None) -> Iterator[tuple[dict[str, Any], TrainRecord]]:
    """Every row as it stands and as a record; one that waits for its negatives has none.

    What is wrong goes to ``problems``, or is raised at the end as a ``DataError``.
    """
    given, problems = problems is not None, Problems() if problems is None else problems
    for path in files:
        for line, row in read_rows(path, problems):
            record = parse_pairs(row, str(path), line, problems)
            if record is not None:
                yield row, record
    if not given:
        problems.raise_if_any()


def checked_files(paths: Sequence[str]) -> list[Path]:
    """The files that ``paths`` name. Raises ``DataError`` with every problem in them."""
    problems = Problems()
    files = [Path(file.path) for file in find_files(paths, problems)]
    for _ in valid_rows(files, problems):
        pass
    problems.raise_if_any()
    return files


def merge(inputs: Sequence[str], output: Path, keep_repeated: bool = False, overwrite: bool = False) -> Counter[str]:
    """Merge; returns how many rows were ``kept`` and ``repeated``. Raises ``UserError``."""
    check_output(output, overwrite)
    files = checked_files(inputs)
    identity = {"inputs": [file["sha256"] for file in fingerprints(files)], "keep_repeated": keep_repeated}
    counts, seen = Counter[str](), KeySet()
    with Job(output, identity, overwrite=overwrite) as job:
        rows = valid_rows(files)
        for _, record in islice(rows, job.done):  # an earlier run wrote these; they only have to be remembered
            seen.add(row_key(record))
        progress = Progress("rows", done=job.done)
        for row, record in rows:
            new = seen.add(row_key(record)) or keep_repeated
            job.add([row] if new else [], "kept" if new else "repeated")
            progress.step()
        counts.update(job.notes())
        job.finish()
    return counts


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and merge."""
    parser = Parser("Several training files as one, without repeated rows.")
    parser.add_argument("--input_file", nargs="+", required=True, metavar="PATH", help="files, or folders of them")
    parser.add_argument("--output_file", required=True, metavar="FILE", help="the rows of all of them")
    add_bool_flag(parser, "--keep_repeated", help="keep rows that say the same as an earlier one")
    add_bool_flag(parser, "--overwrite", help="replace an output that is there")
    a = parser.parse_args(argv)
    counts = merge(a.input_file, Path(a.output_file), a.keep_repeated, a.overwrite)
    print(f"{a.output_file}: {counts['kept']:,} rows, {counts['repeated']:,} repeated ones left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
