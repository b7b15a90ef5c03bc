"""How passages become an index, and who encodes which of them. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.modes import PARTS, Mode, Part, parse_modes, parts_of

ColbertType = Literal["fp16", "fp32", "int8"]


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


@dataclass(frozen=True)
class StoreArguments:
    """Modes."""

    modes: list[str] = option(
        ["dense"], "what to embed: dense, sparse, colbert, bm25; or sums of them, such as all", "--mode"
    )
    colbert_type: ColbertType | None = choice(ColbertType, None, "numbers of stored colbert vectors; default: fp16")

    def __post_init__(self) -> None:
        if self.colbert_type is not None and "colbert" not in self.parts:
            raise UsageError("--colbert_type has no effect without colbert in --modes")

    @property
    def parts(self) -> list[Part]:
        """The modes that are stored."""
        return parts_of(parse_modes(self.modes))

    @property
    def vector_type(self) -> ColbertType:
        """How colbert vectors are stored."""
        return self.colbert_type or "fp16"


@dataclass(frozen=True)
class ModeArguments:
    """Modes."""

    modes: list[str] = option(
        ["dense"], "dense, sparse, colbert, bm25, sums such as dense+sparse or all, and sums-rrf, sums-tuned",
        "--mode",
    )  # fmt: skip
    fusion_weights: list[float] = option([1.0, 0.3, 1.0], "of dense, sparse and colbert in sums")
    rrf_k: int = option(60, "k of -rrf: a passage counts (k + 1) / (k + rank) in each list")
    rerank: int = option(
        200, "candidates of each other mode that colbert scores; 0: every passage, by stored vectors of step 0"
    )
    rerank_from: list[str] = option(["dense"], "whose candidates colbert alone reranks: dense, sparse, bm25")
    tune_queries: int = option(500, "train queries, at most, by which the weights of -tuned are chosen")

    def __post_init__(self) -> None:
        modes, given = self.parsed, self.fusion_weights
        if len(given) != 3 or min(given) < 0:
            raise UsageError(f"--fusion_weights {' '.join(map(str, given))}: give three numbers of 0 or more")
        if self.rrf_k < 0 or self.rerank < 0 or self.tune_queries < 1:
            raise UsageError(f"--rrf_k {self.rrf_k} --rerank {self.rerank} --tune_queries {self.tune_queries}: too low")
        weights = dict(zip(PARTS, given, strict=False))
        for mode in modes:
            if len(mode.parts) > 1 and mode.fusion == "weights" and not sum(weights[part] for part in mode.parts):
                raise UsageError(f"--fusion_weights: those of {mode.name} are all 0")
        first = parse_modes(self.rerank_from, "--rerank_from")
        if any(len(mode.parts) > 1 or "colbert" in mode.parts for mode in first):
            raise UsageError(f"--rerank_from {' '.join(self.rerank_from)}: give dense, sparse or bm25, or several")
        alone, colbert = Mode(("colbert",)) in modes, "colbert" in parts_of(modes)
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        for name, needed, there in (
            ("fusion_weights", "a sum in --modes", any(len(m.parts) > 1 and m.fusion == "weights" for m in modes)),
            ("rrf_k", "a mode that ends in -rrf", any(mode.fusion == "rrf" for mode in modes)),
            ("rerank", "colbert in --modes", colbert),
            ("rerank_from", "the mode colbert and --rerank above 0", alone and self.rerank > 0),
            ("tune_queries", "a mode that ends in -tuned", any(mode.fusion == "tuned" for mode in modes)),
        ):
            if not there and getattr(self, name) != defaults[name]:
                raise UsageError(f"--{name} has no effect without {needed}")

    @property
    def parsed(self) -> list[Mode]:
        """What ``modes`` names."""
        return parse_modes(self.modes)

    @property
    def parts(self) -> list[Part]:
        """The parts that the modes need, those included whose candidates colbert reranks."""
        alone = Mode(("colbert",)) in self.parsed and self.rerank > 0
        return parts_of([*self.parsed, *(parse_modes(self.rerank_from) if alone else [])])

    @property
    def weights(self) -> dict[Part, float]:
        """Of each part in a sum."""
        return dict(zip(PARTS, self.fusion_weights, strict=False))
