"""The command line of ``hard_negatives``: upstream's flags by their names, and ours. Imports no torch (``--help``).

A flag left alone that the index has an opinion on (length, instruction, title) follows the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.indexing.arguments import ModeArguments
from FlagEmbedding.mining.common.options import MiningEncoder, ReportedOutput, RerankerArguments, SearchArguments
from FlagEmbedding.mining.hard_negatives.filters import Sampling, ScoreFilters
from FlagEmbedding.utils.cli import choice, option, parse_whole, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.modes import DENSE

_EXAMPLES = """examples:
  from MIRACL's raw train split (files on disk, or the hub):
    python -m FlagEmbedding.mining.hard_negatives --data_dir ./miracl --language ko --split train \\
        --encoder BAAI/bge-m3 --range_for_sampling 2-30 --negative_number 8 --output_file train_data/ko.jsonl
  from training rows (neg may be missing) and any corpus of {"text": …} lines, with filters:
    python -m FlagEmbedding.mining.hard_negatives --input_file rows.jsonl --corpus corpus.jsonl \\
        --encoder BAAI/bge-m3 --relative_margin 0.05 --output_file train_data/mined.jsonl
"""

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class InputArguments:
    """Queries, positives and corpus."""

    input_file: list[str] = option([], "training rows: query, pos, perhaps neg and neg_q", metavar="FILE")
    data_dir: str | None = option(None, "folder in MIRACL's layout or BEIR's, asked before the hub (with --language)")
    language: str | None = option(None, "MIRACL language (or --data_dir's own): topics and qrels of --split, corpus")
    split: Split = choice(Split, "train", "which topics and qrels")
    corpus: list[str] = option(
        [], "JSON lines with text (docid and title optional), files or folders; default: MIRACL's corpus of the "
        "language, or the passages of the rows themselves", "--candidate_pool", metavar="PATH",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if bool(self.input_file) == bool(self.language):
            raise UsageError("give either --input_file (training rows) or --language (MIRACL topics and qrels)")
        if self.data_dir and not self.language:
            raise UsageError("--data_dir has no effect without --language")


@dataclass(frozen=True)
class MinedOutput(ReportedOutput):
    """Output."""

    with_scores: bool = switch(False, "write pos_scores and neg_scores (teacher scores for distillation)")


@dataclass(frozen=True)
class CandidateArguments:
    """Candidates."""

    modes: list[str] = option(
        ["dense"], "what finds them: dense, sparse, colbert, bm25, sums as in step 1; of several, the union"
    )

    def __post_init__(self) -> None:
        for mode in self.searched.parsed:
            if mode.fusion == "tuned":
                raise UsageError(f"--modes {mode.name}: mining tunes no weights; give {'+'.join(mode.parts)}-rrf")

    @property
    def searched(self) -> ModeArguments:
        """The same as step 1 takes it."""
        return ModeArguments(self.modes)

    @property
    def dense_alone(self) -> bool:
        """True for the published search."""
        return self.searched.parsed == [DENSE]


@dataclass(frozen=True)
class MiningOptions:
    """Everything that the command line says."""

    input: InputArguments
    output: MinedOutput
    encoder: MiningEncoder
    search: SearchArguments
    sampling: Sampling
    filters: ScoreFilters
    reranker: RerankerArguments
    candidates: CandidateArguments = CandidateArguments()

    def __post_init__(self) -> None:
        filters, sampling, reranker = self.filters.given(), self.sampling, self.reranker.cross_encoder
        first, last = sampling.window
        if sampling.random_negatives:
            given = {"cross_encoder": reranker, **vars(self.output), "index_dir": self.search.index_dir}
            given["modes"] = not self.candidates.dense_alone
            names = ("cross_encoder", "with_scores", "index_dir", "modes")
            useless = [*filters, *(name for name in names if given[name])]
            if useless:
                raise UsageError(
                    f"--{useless[0]} has no effect with --random_negatives, which scores nothing: leave it out"
                )
        elif not self.encoder.encoder:
            raise UsageError("--encoder is missing: name the checkpoint that embeds queries and passages")
        elif sampling.negative_number > last - first:
            raise UsageError(
                f"--negative_number {sampling.negative_number} is more than --range_for_sampling "
                f"{sampling.range_for_sampling} holds ({last - first}): widen the window"
            )
        elif reranker and not filters and not self.output.with_scores:
            raise UsageError("--cross_encoder has no effect without a filter (such as --max_score) or --with_scores")


def parse_mining_options(argv: Sequence[str] | None = None) -> MiningOptions:
    """Parse and check. Raises ``UsageError``."""
    return parse_whole(MiningOptions, argv, "Mine hard negatives (ANCE): training rows of query, pos, neg.", _EXAMPLES)
