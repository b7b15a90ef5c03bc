"""Options that several mining commands have, each read whole by what it is for. Imports no torch (``--help``)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.inference.arguments import WINDOW, EncoderArguments
from FlagEmbedding.utils.cli import option, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import packing

# Names under which JSON lines would be taken for something else.
_NO_LINES = {
    ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".pkl",
    ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4", ".br", ".zstd",
}  # fmt: skip

_LONGEST_NAME = 220  # what stands beside it, such as a journal and its lock, has longer ones


def check_least(options: Any, **least: float) -> None:
    """Refuse a number of ``options`` below its least value (``UsageError``); None was not given."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UsageError(f"--{name} must be at least {smallest:g}, got {value:g}")


@dataclass(frozen=True)
class OutputArguments:
    """Output."""

    output_file: str = option(help="the training rows", metavar="FILE")
    overwrite: bool = switch(False, "replace an output that is there")

    def __post_init__(self) -> None:
        if (length := len(os.fsencode(self.path.name))) > _LONGEST_NAME:
            raise UsageError(
                f"--output_file: a name of {length} bytes, at most {_LONGEST_NAME} can be written; shorten it"
            )
        for ending in _NO_LINES.intersection(suffix.lower() for suffix in self.path.suffixes[-2:]):
            raise UsageError(
                f"--output_file {self.output_file}: JSON lines are written, and {ending} says otherwise; name a .jsonl "
                "file, or .jsonl.gz or .jsonl.zst to have it packed"
            )

    @property
    def path(self) -> Path:
        """The file to write."""
        return Path(self.output_file)


@dataclass(frozen=True)
class ReportedOutput(OutputArguments):
    """Output."""

    report_dir: str | None = option(None, "where the report goes; default: reports/ beside the file")

    def report(self, suffix: str = "") -> Path:
        """Path of the report without the ending: the output's name and ``suffix``."""
        folder = Path(self.report_dir) if self.report_dir else self.path.parent / "reports"
        name = self.path.name
        return folder / (name[: -len(packing(name)) or None].removesuffix(".jsonl") + suffix)


@dataclass(frozen=True)
class RerankerArguments:
    """Reranker."""

    cross_encoder: str | None = option(
        None, "a reranker whose scores the filters see, and --with_scores writes (one label, sigmoid)", "--reranker"
    )
    cross_encoder_max_length: int = option(512, "tokens per pair")
    cross_encoder_batch_size: int = option(32, "pairs at a time")

    def __post_init__(self) -> None:
        check_least(self, cross_encoder_batch_size=1)


@dataclass(frozen=True)
class MiningEncoder(EncoderArguments):
    """Encoder."""

    encoder: str = option("", "hub id or folder of the checkpoint", "--model_name_or_path", "--embedder_name_or_path")
    fp16: bool = switch(False, "half precision: fp16 on a GPU, --dtype auto on a CPU", "--use_fp16")
    workers: int | None = option(0, "processes that tokenize ahead; 0: a thread")


@dataclass(frozen=True)
class SearchArguments:
    """Index and search.

    What is None follows the index.
    """

    query_max_length: int = option(512, "tokens per query", "--embedder_query_max_length")
    passage_max_length: int | None = option(
        None, "tokens per passage; default: as the index was made, else 512", "--embedder_passage_max_length",
        "--max_passage_length",
    )  # fmt: skip
    query_instruction_for_retrieval: str | None = option(None, "text put before every query", metavar="TEXT")
    passage_instruction_for_retrieval: str | None = option(None, "text put before every passage", metavar="TEXT")
    with_title: bool | None = switch(None, "passages are title and text")
    index_dir: str | None = option(None, "an index folder of step 0 to reuse, or where to build one")
    index_save_dir: str = option(
        "./corpus-index", "without --index_dir: {this}/{encoder}/{language}, as step 0", metavar="DIR"
    )
    search_batch_size: int = option(WINDOW, "queries that are embedded and searched together")
    threads: int = option(1, "CPU threads of the search")
    use_gpu_for_searching: bool = switch(False, "accepted as published: the search runs where the encoder does")

    def __post_init__(self) -> None:
        check_least(self, search_batch_size=1, threads=1)
