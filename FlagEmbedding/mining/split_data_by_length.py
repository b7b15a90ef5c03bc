"""Split training files by the length of their rows: ``python -m FlagEmbedding.mining.split_data_by_length``.

A row's length is that of its longest text in tokens, special tokens included: query, passages, and the negatives' own
queries, which are encoded too. ``train.jsonl`` becomes ``train_len-0-500.jsonl``, ``train_len-500-1000.jsonl``, … and
with ``--same_task_within_batch True`` each batch then holds rows of like length; with ``--batch_size_by_length True``
the names also choose the batch size.

Rows are written as they came, all columns kept, in one pass and without a second copy in memory. Every output file
appears whole or not at all. ``--num_proc`` bounds the tokenizer's threads; ``--cache_dir`` is where a tokenizer from
the hub is kept (nothing else needs a cache here).
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from FlagEmbedding.mining.common.options import check_least
from FlagEmbedding.mining.common.rows import json_line, load_tokenizer
from FlagEmbedding.schema import Problems, TrainRecord, find_files, parse_record, read_rows
from FlagEmbedding.utils.cli import entry_point, option, parse, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import atomic_open
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

_BATCH = 64
_SPLIT_NAME = re.compile(r"_len-\d+-(\d+|inf)\.jsonl$")

Row = tuple[dict[str, Any], TrainRecord]


@dataclass(frozen=True)
class Bucket:
    """Rows of ``low`` to under ``high`` tokens; ``high`` None has no upper end."""

    low: int
    high: int | None

    @property
    def name(self) -> str:
        """As it stands in file names: ``len-0-500``, ``len-7000-inf``."""
        return f"len-{self.low}-{'inf' if self.high is None else self.high}"

    def holds(self, length: int) -> bool:
        """True for a row of ``length`` tokens that belongs here."""
        return self.low <= length < (math.inf if self.high is None else self.high)


def make_buckets(bounds: Sequence[int]) -> list[Bucket]:
    """The ranges between ``bounds`` and one from the last up. Raises ``UsageError`` for double or negative bounds."""
    ordered = sorted(bounds)
    if not ordered or ordered[0] < 0 or len(set(ordered)) < len(ordered):
        raise UsageError(f"--length_list needs different numbers from 0 up, got {' '.join(map(str, bounds))}")
    return [Bucket(low, high) for low, high in zip(ordered, [*ordered[1:], None], strict=True)]


@dataclass(frozen=True)
class SplitArguments:
    """Split by length."""

    input_path: str = option(help="a training file, or a folder of such files")
    output_dir: str = option(help="where the parts are written")
    cache_dir: str | None = option(None, "where a tokenizer from the hub is kept")
    log_name: str = option(".split_log", "name of the log in the output folder")
    length_list: list[int] = option(
        [0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000], "lower ends of the ranges, in tokens"
    )
    model_name_or_path: str = option("BAAI/bge-m3", "whose tokenizer counts")
    num_proc: int = option(16, "threads at most, and no more than there are cores")
    overwrite: bool = switch(False, "replace output files that exist")

    def __post_init__(self) -> None:
        check_least(self, num_proc=1)
        make_buckets(self.length_list)


@dataclass
class SplitByLength:
    """Splits files with one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        buckets: ranges of lengths.
        overwrite: replace output files that exist; otherwise they stay as they are.
    """

    tokenizer: Any
    buckets: list[Bucket]
    overwrite: bool = False

    def run(self, options: SplitArguments) -> list[dict[str, Any]]:
        """Split a file or the files of a folder, and append what became of each to the log.

        Returns:
            The log's entries.

        Raises:
            DataError: problems in the rows, before anything of the file concerned is written.
            UsageError: the outputs of two files would have the same name.
        """
        problems = Problems()
        # A folder that is split into itself holds the outputs of the last time.
        files = [f.path for f in find_files([options.input_path], problems) if not _SPLIT_NAME.search(f.path)]
        problems.raise_if_any()
        stems: dict[str, str] = {}
        for path in files:
            stem = Path(path).name.removesuffix(".gz").rpartition(".")[0] or Path(path).name
            if stem in stems:
                raise UsageError(f"{stems[stem]} and {path} would both be written to {stem}_len-…: rename one of them")
            stems[stem] = path
        folder, entries = Path(options.output_dir), []
        folder.mkdir(parents=True, exist_ok=True)
        for stem, path in stems.items():
            entry = self.split_file(path, folder / stem)
            entries.append(entry)
            with open(folder / options.log_name, "a", encoding="utf-8") as log:
                log.write(json_line(entry))
        return entries

    def split_file(self, path: str, output: Path) -> dict[str, Any]:
        """Split ``path`` into ``{output}_len-….jsonl``; returns the log entry (published keys)."""
        start = _now()
        targets = {bucket: output.with_name(f"{output.name}_{bucket.name}.jsonl") for bucket in self.buckets}
        kept = {bucket for bucket in self.buckets if targets[bucket].exists() and not self.overwrite}
        for bucket in kept:
            logger.info("%s exists and stays as it is (--overwrite True replaces it)", targets[bucket])
        counts = {bucket: 0 for bucket in self.buckets if bucket not in kept}
        size = tokens = left_out = 0
        problems = Problems()
        with ExitStack() as stack:
            streams: dict[Bucket, IO[str]] = {}
            rows = _rows(path, problems)
            while chunk := list(islice(rows, _BATCH)):
                for (row, _), length in zip(chunk, self.row_lengths([record for _, record in chunk]), strict=True):
                    home = next((bucket for bucket in self.buckets if bucket.holds(length)), None)
                    size, tokens, left_out = size + 1, tokens + length, left_out + (home is None)
                    if home is None or home in kept:
                        continue
                    if home not in streams:
                        streams[home] = stack.enter_context(atomic_open(targets[home]))
                    streams[home].write(json_line(row))
                    counts[home] += 1
            # Inside the block: an error throws away what was written.
            problems.raise_if_any()
        for bucket, count in counts.items():
            if not count:
                targets[bucket].unlink(missing_ok=True)  # of an earlier run, and now without rows
        if left_out:
            logger.warning("%s: %d rows are shorter than %d tokens and left out", path, left_out, self.buckets[0].low)
        logger.info("%s: %d rows, %s", path, size, ", ".join(f"{b.name}: {n}" for b, n in counts.items() if n))
        return {
            "file_name": Path(path).name,
            "size": size,
            "avg_length": tokens / size,
            "file_path": path,
            "start_time": start,
            "end_time": _now(),
            "split_info": {bucket.name: count for bucket, count in counts.items()},
        }

    def row_lengths(self, records: Sequence[TrainRecord]) -> list[int]:
        """Tokens of the longest text of each record."""
        texts: list[str] = []
        ends: list[int] = []
        for record in records:
            texts += [record.query, *record.pos, *record.neg]
            texts += [query for queries in record.neg_q or () for query in queries]
            ends.append(len(texts))
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return [max(lengths[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _rows(path: str, problems: Problems) -> Iterator[Row]:
    for line, row in read_rows(path, problems):
        record = parse_record(row, path, line, problems)
        if record is not None:
            yield row, record


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and split."""
    (options,) = parse([SplitArguments], argv, "Split training files by the length of their rows.")
    # Read by the tokenizer's thread pool when it starts.
    os.environ["RAYON_NUM_THREADS"] = str(min(options.num_proc, os.cpu_count() or 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer("--model_name_or_path", options.model_name_or_path, options.cache_dir)
    for entry in SplitByLength(tokenizer, make_buckets(options.length_list), options.overwrite).run(options):
        print(f"{entry['file_path']}: {entry['size']} rows, {entry['avg_length']:.1f} tokens on average")
        for name, count in entry["split_info"].items():
            if count:
                print(f"  {name}: {count}")


if __name__ == "__main__":
    sys.exit(main())
