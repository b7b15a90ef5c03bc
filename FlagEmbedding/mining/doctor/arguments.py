"""The command line of ``doctor``. Imports no torch (``--help``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.mining.common.options import check_least
from FlagEmbedding.utils.cli import internal, option, positional
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class ReadingArguments:
    """What is read, and what is said of it."""

    paths: list[str] = positional("a folder of .json/.jsonl files, or such a file")
    report_dir: str | None = option(None, "where the report goes; default: reports/doctor in or beside what is read")
    train_group_size: int | None = option(None, "names rows with too few negatives for it")
    sample_rows: int = option(0, "look at the texts of this many rows only, drawn by --seed; 0: all")
    seed: int = option(42, "decides which")

    def __post_init__(self) -> None:
        check_least(self, sample_rows=0)

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        given = Path(self.paths[0])
        return Path(self.report_dir or (given if given.is_dir() else given.parent) / "reports" / "doctor")


@dataclass(frozen=True)
class ScoreSettings:
    """Lengths, instructions and temperature, as in training."""

    query_max_len: int = option(128, "tokens, as in training")
    passage_max_len: int = option(512, "tokens, as in training")
    temperature: float = option(0.02, "of the loss")
    query_instruction_for_retrieval: str | None = option(
        None, "text put before every query and neg_q; default: what the checkpoint says", metavar="TEXT"
    )
    passage_instruction_for_retrieval: str | None = option(
        None, "text put before every passage; default: what the checkpoint says", metavar="TEXT"
    )

    def __post_init__(self) -> None:
        check_least(self, query_max_len=1, passage_max_len=1)
        if self.temperature <= 0:
            raise UsageError(f"--temperature must be above 0, got {self.temperature:g}")


@dataclass(frozen=True)
class DoctorEncoder(EncoderArguments):
    """Model."""

    encoder: str = option("", "checkpoint for cosines, margins and tokens: hub id or folder", "--model")
    tokenizer: str | None = option(None, "instead of --model: lengths in tokens without embedding anything")
    normalize_embeddings: bool = internal(True)  # cosines

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder and self.tokenizer:
            raise UsageError("--model brings its own tokenizer: leave --tokenizer out")


@dataclass(frozen=True)
class DoctorOptions:
    """Everything that the command line says."""

    reading: ReadingArguments
    settings: ScoreSettings
    encoder: DoctorEncoder
