"""How passages become an index: the options that :func:`indexing.encoding.build_index` reads. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.utils.cli import option, switch
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class IndexArguments:
    """Passages."""

    max_passage_length: int = option(512, "tokens per passage; the rest is cut off")
    with_title: bool = switch(False, "embed title and text (MIRACL's own rule); published: text alone")
    passage_instruction_for_retrieval: str | None = option(
        None, "text put before every passage; default: what the checkpoint says", metavar="TEXT"
    )
    allow_empty: bool = switch(False, "embed passages without text instead of refusing them")
    shard_size: int = option(WINDOW, "passages per shard: sorted together, lost by a kill at most")
    overwrite: bool = switch(False, "encode again what is there")

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise UsageError(f"--shard_size must be at least 1, got {self.shard_size}")
