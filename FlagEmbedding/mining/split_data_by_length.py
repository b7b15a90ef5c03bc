"""Split training files by the length of their rows: ``python -m FlagEmbedding.mining.split_data_by_length``.

A row's length is that of its longest text in tokens, special tokens included: query, passages, and the negatives' own
queries, which are encoded too. ``train.jsonl`` becomes ``train_len-0-500.jsonl``, ``train_len-500-1000.jsonl``, … and
with ``--same_task_within_batch True`` each batch then holds rows of like length; with ``--batch_size_by_length True``
the names also choose the batch size.

Rows are written as they came, all columns kept, in one pass and without a second copy in memory. Every output file
appears whole or not at all.
"""

from __future__ import annotations

import os
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
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
from FlagEmbedding.utils.io import atomic_open, packing
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

_BATCH, _TIME = 64, "%Y-%m-%d %H:%M:%S"
_SPLIT_NAME = re.compile(r"_len-\d+-(\d+|inf)\.jsonl$")


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
        bounds = self.bounds
        if not bounds or bounds[0] < 0 or len(set(bounds)) < len(bounds):
            given = " ".join(map(str, self.length_list))
            raise UsageError(f"--length_list needs different numbers from 0 up, got {given}")

    @property
    def bounds(self) -> list[int]:
        """Lower ends of the ranges, ascending."""
        return sorted(self.length_list)

    @property
    def parts(self) -> list[str]:
        """The ranges as they stand in file names: ``len-0-500``, …, ``len-7000-inf``. An upper end is not included."""
        ends = [*map(str, self.bounds[1:]), "inf"]
        return [f"len-{low}-{high}" for low, high in zip(self.bounds, ends, strict=True)]


def split_files(options: SplitArguments, tokenizer: Any) -> list[dict[str, Any]]:
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
        name = Path(path).name
        stem = name[: -len(packing(name)) or None].rpartition(".")[0] or name
        if stems.setdefault(stem, path) != path:
            raise UsageError(f"{stems[stem]} and {path} would both be written to {stem}_len-…: rename one of them")
    folder, entries = Path(options.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for stem, path in stems.items():
        entries.append(split_file(path, folder / stem, options, tokenizer))
        with open(folder / options.log_name, "a", encoding="utf-8") as log:
            log.write(json_line(entries[-1]))
    return entries


def split_file(path: str, output: Path, options: SplitArguments, tokenizer: Any) -> dict[str, Any]:
    """Split ``path`` into ``{output}_len-….jsonl``; returns the log entry (published keys)."""
    start, bounds, parts = time.strftime(_TIME), options.bounds, options.parts
    targets = {part: output.with_name(f"{output.name}_{part}.jsonl") for part in parts}
    kept = [part for part in parts if targets[part].exists() and not options.overwrite]
    for part in kept:
        logger.info("%s exists and stays as it is (--overwrite True replaces it)", targets[part])
    counts = {part: 0 for part in parts if part not in kept}
    size = tokens = left_out = 0
    problems, streams = Problems(), dict[str, IO[str]]()
    read = ((row, parse_record(row, path, line, problems)) for line, row in read_rows(path, problems))
    rows = ((row, record) for row, record in read if record is not None)
    with ExitStack() as stack:
        while chunk := list(islice(rows, _BATCH)):
            for (row, _), length in zip(chunk, row_lengths([record for _, record in chunk], tokenizer), strict=True):
                size, tokens = size + 1, tokens + length
                if length < bounds[0]:
                    left_out += 1
                    continue
                part = parts[bisect_right(bounds, length) - 1]
                if part in kept:
                    continue
                if part not in streams:
                    streams[part] = stack.enter_context(atomic_open(targets[part]))
                streams[part].write(json_line(row))
                counts[part] += 1
        problems.raise_if_any()  # inside the block: an error throws away what was written
    for part, count in counts.items():
        if not count:
            targets[part].unlink(missing_ok=True)  # of an earlier run, and now without rows
    if left_out:
        logger.warning("%s: %d rows are shorter than %d tokens and left out", path, left_out, bounds[0])
    logger.info("%s: %d rows, %s", path, size, ", ".join(f"{part}: {n}" for part, n in counts.items() if n))
    return {
        "file_name": Path(path).name, "size": size, "avg_length": tokens / size, "file_path": path,
        "start_time": start, "end_time": time.strftime(_TIME), "split_info": counts,
    }  # fmt: skip


def row_lengths(records: Sequence[TrainRecord], tokenizer: Any) -> list[int]:
    """Tokens of the longest text of each record."""
    texts: list[str] = []
    ends: list[int] = []
    for record in records:
        texts += [record.query, *record.pos, *record.neg]
        texts += [query for queries in record.neg_q or () for query in queries]
        ends.append(len(texts))
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return [max(lengths[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and split."""
    (options,) = parse([SplitArguments], argv, "Split training files by the length of their rows.")
    # Read by the tokenizer's thread pool when it starts.
    os.environ["RAYON_NUM_THREADS"] = str(min(options.num_proc, os.cpu_count() or 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer("--model_name_or_path", options.model_name_or_path, options.cache_dir)
    for entry in split_files(options, tokenizer):
        print(f"{entry['file_path']}: {entry['size']} rows, {entry['avg_length']:.1f} tokens on average")
        for name, count in entry["split_info"].items():
            if count:
                print(f"  {name}: {count}")


if __name__ == "__main__":
    sys.exit(main())
