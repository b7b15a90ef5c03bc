"""Training rows as mining reads and writes them: checked, told apart, with or without their negatives."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from FlagEmbedding.schema import Problems, TrainRecord, find_files, parse_record, read_rows
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.texts import text_key


def json_line(value: Any) -> str:
    """``value`` as one line of JSON with its line end; text as it is, escaped only where UTF-8 cannot hold it."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # a table may hold dates in columns that are not ours
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, in a column that is not ours
        text = json.dumps(value, default=str)
    return text + "\n"


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


def parse_pairs(row: dict[str, Any], path: str, line: int, problems: Problems) -> TrainRecord | None:
    """A training row whose ``neg`` may still be missing (it is empty then); other problems go to ``problems``."""
    if row.get("neg"):
        return parse_record(row, path, line, problems)
    # A row that waits for its negatives: the schema's other rules are asked with one in place.
    bare = {key: value for key, value in row.items() if key not in ("neg_q", "neg_scores")}
    record = parse_record({**bare, "neg": ["-"]}, path, line, problems)
    return None if record is None else replace(record, neg=[])


def valid_rows(files: Sequence[Path], problems: Problems) -> Iterator[tuple[dict[str, Any], TrainRecord]]:
    """Every row as it stands and as a record, whose ``neg`` may be empty; what is wrong goes to ``problems``."""
    for path in files:
        for line, row in read_rows(path, problems):
            record = parse_pairs(row, str(path), line, problems)
            if record is not None:
                yield row, record


def data_files(paths: Sequence[str]) -> list[Path]:
    """The files that ``paths`` (files or folders) name. Raises ``DataError`` where one is not there."""
    problems = Problems()
    files = [Path(file.path) for file in find_files(paths, problems)]
    problems.raise_if_any()
    return files


def load_tokenizer(flag: str, name: str, cache_dir: str | None = None) -> Any:
    """The tokenizer of a hub id or folder, as ``flag`` named it. Raises ``UsageError`` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{flag} {name}: no tokenizer can be loaded from there ({reason})") from error
