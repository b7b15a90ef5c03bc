"""Training files as memory-mapped Arrow tables: a row costs disk, not RAM, and workers share its pages.

A file is read, checked and converted in one pass. The table lies in the cache folder under the SHA-256 of the file's
bytes, so that a changed file is converted anew and an unchanged one is opened at once; the user's data folder is never
written to. With several processes the first converts, the others wait for its lock and open the result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

from FlagEmbedding.schema import SHOWN_PROBLEMS, DataFile, Problem, Problems, TrainRecord, read_records, unreadable
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open, sha256_file, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# Part of the cached file's name: a new number makes every table be written anew.
_FORMAT = 1
_ROWS_A_BATCH = 256

_TEXTS = datasets.List(datasets.Value("string"))
_NUMBERS = datasets.List(datasets.Value("float64"))
FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "pos": _TEXTS,
        "neg": _TEXTS,
        "pos_scores": _NUMBERS,
        "neg_scores": _NUMBERS,
        "neg_q": datasets.List(_TEXTS),
        "line": datasets.Value("int64"),
    }
)


@dataclass
class FileStatistics:
    """Counts over the valid rows of one file; ``unscored`` are the first lines without teacher scores."""

    rows: int = 0
    scored: int = 0
    with_neg_q: int = 0
    negatives: int = 0
    negatives_with_query: int = 0
    fewest_negatives: int = 0
    unscored: list[int] = field(default_factory=list)

    def observe(self, record: TrainRecord) -> None:
        """Count one row."""
        negatives = len(record.neg)
        self.fewest_negatives = min(self.fewest_negatives, negatives) if self.rows else negatives
        self.rows += 1
        self.negatives += negatives
        if record.pos_scores is not None and record.neg_scores is not None:
            self.scored += 1
        elif len(self.unscored) < SHOWN_PROBLEMS:
            self.unscored.append(record.line)
        if record.neg_q is not None:
            self.with_neg_q += 1
            self.negatives_with_query += sum(map(bool, record.neg_q))


@dataclass
class StoredFile:
    """One training file, opened: ``table`` holds its rows with the columns of ``FEATURES``."""

    file: DataFile
    table: datasets.Dataset
    statistics: FileStatistics


def scan_file(path: str, problems: Problems) -> FileStatistics:
    """Check and count a file without converting it."""
    statistics = FileStatistics()
    for record in read_records(path, problems):
        statistics.observe(record)
    return statistics


def cache_folder(cache_path: str | None) -> Path:
    """Where tables are kept: ``cache_path``, or a folder of the ``datasets`` cache (``HF_DATASETS_CACHE``)."""
    return Path(cache_path or datasets.config.HF_DATASETS_CACHE) / "flagembedding-train"


def store_file(file: DataFile, folder: Path, problems: Problems) -> StoredFile | None:
    """Open ``file`` out of the cache ``folder``, converting it first where needed.

    Returns None when the file has problems (then nothing of it is cached). Raises ``DataError`` when the cache cannot
    be written.
    """
    try:
        digest = sha256_file(file.path)
    except OSError as error:
        problems.add(unreadable(file.path, error))
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrow = folder / f"train-v{_FORMAT}-{digest[:32]}.arrow"
        counts = arrow.with_suffix(".json")
        with FileLock(arrow.with_suffix(".lock")):
            # The counts are written last, so that they vouch for the table.
            if not (counts.exists() and arrow.exists()) and not _convert(file, arrow, counts, problems):
                return None
        table = datasets.Dataset.from_file(str(arrow))
    except OSError as error:
        raise DataError(
            f"{folder}: the prepared training rows cannot be kept there ({error}); name a writable folder with enough "
            "room by --cache_path"
        ) from error
    return StoredFile(file, table, FileStatistics(**json.loads(counts.read_text("utf-8"))))


def _convert(file: DataFile, arrow: Path, counts: Path, problems: Problems) -> bool:
    """Write the table and its counts; False, and nothing written, when ``file`` has problems."""
    before = problems.count
    statistics = FileStatistics()
    try:
        with atomic_open(arrow, "wb") as stream, ArrowWriter(stream=stream, features=FEATURES) as writer:
            records = read_records(file.path, problems)
            while chunk := list(islice(records, _ROWS_A_BATCH)):
                for record in chunk:
                    statistics.observe(record)
                if problems.count == before:
                    writer.write_batch({name: [getattr(record, name) for record in chunk] for name in FEATURES})
            if problems.count > before:
                raise _Unusable
            writer.finalize(close_stream=False)
    except _Unusable:
        return False
    write_json_atomic(counts, asdict(statistics))
    logger.info("%s: %d rows prepared", file.path, statistics.rows)
    return True


class _Unusable(Exception):
    """Leaves the atomic block, which throws the half-written table away."""


def report_missing_scores(file: DataFile, statistics: FileStatistics, problems: Problems) -> None:
    """Add the rows without teacher scores of a file whose other rows have them."""
    if 0 < statistics.scored < statistics.rows:
        cure = f"{statistics.scored} of {statistics.rows} rows here have both: give them to all rows, or to none"
        for line in statistics.unscored:
            problems.add(Problem(file.path, line, "pos_scores, neg_scores", "are missing", cure))
        problems.count += statistics.rows - statistics.scored - len(statistics.unscored)


def record_of(row: dict[str, Any]) -> TrainRecord:
    """A table's row as a record."""
    return TrainRecord(**row)
