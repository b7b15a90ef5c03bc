"""Training files as memory-mapped Arrow tables: a row costs disk, not RAM, and workers share its pages.

A file is opened once, hashed, and where its table is not there yet checked and converted. The table lies in the cache
folder under the SHA-256 of the file's bytes, so that a changed file is converted again and an unchanged one is there at
once; the user's data folder is never written to. With several processes the first converts, the others wait for its
lock and open the result.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock

from FlagEmbedding.row_counts import FileStatistics
from FlagEmbedding.schema import DataFile, Problems, read_records, unreadable
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# Part of the cached file's name: a new number makes every file be checked and written again. 2: what is no text.
_FORMAT = 2
_ROWS_A_BATCH = 256

_TEXT, _TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
_NUMBERS = datasets.List(datasets.Value("float64"))
FEATURES = datasets.Features({
    "query": _TEXT, "pos": _TEXTS, "neg": _TEXTS, "pos_scores": _NUMBERS, "neg_scores": _NUMBERS,
    "neg_q": datasets.List(_TEXTS), "line": datasets.Value("int64"),
})  # fmt: skip


@dataclass
class StoredFile:
    """One training file, opened: ``table`` holds its rows with the columns of ``FEATURES``."""

    file: DataFile
    table: datasets.Dataset
    statistics: FileStatistics
    digest: str  # SHA-256 of the file's bytes


def cache_folder(cache_path: str | None) -> Path:
    """Where tables are kept: ``cache_path``, or a folder of the ``datasets`` cache (``HF_DATASETS_CACHE``)."""
    return Path(cache_path or datasets.config.HF_DATASETS_CACHE) / "flagembedding-train"


def store_file(file: DataFile, folder: Path, problems: Problems) -> StoredFile | None:
    """Open ``file`` out of the cache ``folder``, converting it first where needed.

    None when the file has problems (then nothing of it is cached). Raises ``DataError``: the cache cannot be written.
    """
    try:
        with open(file.path, "rb") as stream:
            return _stored(file, stream, _sha256(stream), folder, problems)
    except OSError as error:
        problems.add(unreadable(file.path, error))
        return None


def _stored(file: DataFile, stream: IO[bytes], digest: str, folder: Path, problems: Problems) -> StoredFile | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrow = folder / f"train-v{_FORMAT}-{digest[:32]}.arrow"
        counts = arrow.with_suffix(".json")
        with FileLock(arrow.with_suffix(".lock")):
            # The counts are written last, so that they vouch for the table.
            if not (counts.exists() and arrow.exists()) and not _convert(file, stream, arrow, counts, problems):
                return None
        table = datasets.Dataset.from_file(str(arrow))
        return StoredFile(file, table, FileStatistics(**json.loads(counts.read_text("utf-8"))), digest)
    except OSError as error:
        raise DataError(
            f"{folder}: the prepared training rows cannot be kept there ({error}); name a writable folder with enough "
            "room by --cache_path"
        ) from error


def _sha256(stream: IO[bytes]) -> str:
    """Hex SHA-256 of an open file, read in 1 MiB pieces and rewound."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    stream.seek(0)
    return digest.hexdigest()


def _convert(file: DataFile, stream: IO[bytes], arrow: Path, counts: Path, problems: Problems) -> bool:
    """Write the table and its counts; False, and nothing written, when ``file`` has problems."""
    before, statistics = problems.count, FileStatistics()
    try:
        with atomic_open(arrow, "wb") as output, ArrowWriter(stream=output, features=FEATURES) as writer:
            records = read_records(file.path, problems, stream)
            while chunk := list(islice(records, _ROWS_A_BATCH)):
                for record in chunk:
                    statistics.observe(record)
                if problems.count == before:
                    writer.write_batch({name: [getattr(record, name) for record in chunk] for name in FEATURES})
            if problems.count > before:
                raise DataError(file.path)  # out of the atomic block, which throws the half-written table away
            writer.finalize(close_stream=False)
    except DataError:
        return False
    write_json_atomic(counts, asdict(statistics))
    logger.info("%s: %d rows prepared", file.path, statistics.rows)
    return True
