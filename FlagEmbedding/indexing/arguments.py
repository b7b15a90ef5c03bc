"""How passages become an index, and who encodes which of them. Imports no torch."""

from __future__ import annotations

import re
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


@dataclass(frozen=True)
class ShareArguments:
    """Workers without a launcher (docs/cluster.md).

    What several machines or jobs do that share a disk, and no process group.
    """

    shards: str | None = option(
        None, "be worker I of N (from 0, such as 3/64): begin at that part of the corpus, then help with the others; "
        "needs no MASTER_ADDR", metavar="I/N",
    )  # fmt: skip
    help_others: bool = switch(True, "False: end with the own part, where workers share no disk (--merge_from)")
    finish: bool = switch(False, "join what workers have encoded into the index; loads no model")
    merge_from: list[str] = option([], "with --finish: --index_save_dir of workers that share no disk", metavar="DIR")

    def __post_init__(self) -> None:
        if self.shards is not None:
            _ = self.part
        if self.finish and self.shards is not None:
            raise UsageError("--finish joins what workers (--shards) have encoded: give one of the two")
        if self.merge_from and not self.finish:
            raise UsageError("--merge_from belongs to --finish")
        if not self.help_others and self.shards is None:
            raise UsageError("--help_others False belongs to --shards")

    @property
    def part(self) -> tuple[int, int]:
        """I and N of ``--shards``; I may count from 0 or from 1."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.shards or "0/1")
        if not found or not int(found[2]) or int(found[1]) > int(found[2]):
            raise UsageError(f"--shards {self.shards}: give the worker and the number of workers, such as 3/64")
        return int(found[1]), int(found[2])
