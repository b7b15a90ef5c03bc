"""The command line of ``from_corpus``: its own groups, and those of the commands that it chains. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from FlagEmbedding.mining.common.options import (
    MiningEncoder,
    ReportedOutput,
    RerankerArguments,
    SearchArguments,
    check_least,
)
from FlagEmbedding.mining.hard_negatives.arguments import InputArguments, MinedOutput, MiningOptions
from FlagEmbedding.mining.hard_negatives.filters import Sampling, ScoreFilters
from FlagEmbedding.mining.query_generation.arguments import (
    CheckArguments,
    EndpointArguments,
    LocalModelArguments,
    QueryOptions,
    ReuseArguments,
    RoundTripArguments,
    WritingArguments,
)
from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError

DESCRIPTION = "From bare documents to a training folder and an eval folder: queries by a model, hard negatives, neg_q."
EXAMPLES = """examples:
  what it would ask, and what that may cost (prices of a million prompt and completion tokens):
    python -m FlagEmbedding.mining from_corpus --corpus docs.jsonl --output_dir mine --encoder BAAI/bge-m3 \\
        --base_url https://generativelanguage.googleapis.com/v1beta/openai/ --model gemini-2.5-flash \\
        --api_key_env GEMINI_API_KEY --passages 1000 --dry_run --prices 0.30 2.50
  the same with a server of one's own, queries in the manner of one's users, one kind alone:
    python -m FlagEmbedding.mining from_corpus --corpus docs/ --output_dir mine --encoder BAAI/bge-m3 \\
        --base_url http://localhost:8000/v1 --model my-model --examples query_log.txt --kinds keywords
"""

NegQ = Literal["generate", "reuse", "none"]
KINDS = ("question", "keywords", "claim")


@dataclass(frozen=True)
class DocumentArguments:
    """Documents."""

    corpus: list[str] = option(
        help="passages: JSON lines or tables with text (docid and title optional), files or folders, also MIRACL's or "
        "BEIR's",
        metavar="PATH",
    )
    passages: int = option(1_000, "how many are drawn to have queries written")
    dev_share: float = option(0.1, "share of those whose queries are dev's; 0: no eval folder")
    min_passage_characters: int = option(40, "shorter passages get no query")
    max_passage_characters: int = option(4_000, "longer passages get no query")

    def __post_init__(self) -> None:
        check_least(self, passages=1, min_passage_characters=1, dev_share=0)
        if self.dev_share >= 1:
            raise UsageError(f"--dev_share must be below 1, got {self.dev_share:g}")
        if self.max_passage_characters < self.min_passage_characters:
            raise UsageError(
                f"--max_passage_characters {self.max_passage_characters} is below --min_passage_characters "
                f"{self.min_passage_characters}"
            )


@dataclass(frozen=True)
class FolderArguments:
    """Output."""

    output_dir: str = option(help="train/, eval/, corpus-index/ and report.md go there", metavar="DIR")
    overwrite: bool = switch(False, "replace what an earlier run of this command left there")
    with_scores: bool = switch(False, "write pos_scores and neg_scores (teacher scores for distillation)")

    def __post_init__(self) -> None:
        if not self.path.name:
            raise UsageError(f"--output_dir {self.output_dir}: name a folder")

    @property
    def path(self) -> Path:
        """The folder to write, whole (``.`` and ``..`` have no name to put a scratch folder beside)."""
        return Path(self.output_dir).resolve() if Path(self.output_dir).name in ("", "..") else Path(self.output_dir)


@dataclass(frozen=True)
class KindArguments:
    """Queries."""

    kinds: list[str] = option(
        [*KINDS], "a query of each is written for each passage; others than ours need a {kind}.txt in --prompt"
    )
    examples: list[str] = option(
        [], "real queries that show the manner: lines of text, or rows with query", metavar="FILE"
    )
    examples_per_prompt: int = option(5, "how many of --examples a prompt shows")
    round_trip_top_k: int = option(
        10, "the rank that a passage must reach by its query, else that is rejected", metavar="K"
    )
    neg_q: NegQ = choice(NegQ, "generate", "queries of negatives: generate what real ones leave open, reuse, none")
    reuse_from: list[str] = option([], "training rows whose real queries may serve as neg_q, too", metavar="FILE")
    prices: list[float] = option(
        [], "of a million prompt and a million completion tokens: --dry_run says what they come to", metavar="PRICE"
    )

    def __post_init__(self) -> None:
        check_least(self, examples_per_prompt=1, round_trip_top_k=1)
        if len(set(self.kinds)) < len(self.kinds):
            raise UsageError(f"--kinds {' '.join(self.kinds)}: a kind is named twice")
        bad = [kind for kind in self.kinds if not kind.replace("_", "").replace("-", "").isalnum()]
        if bad:
            raise UsageError(f"--kinds {bad[0]!r}: give a word of letters, digits, - and _")
        if self.reuse_from and self.neg_q == "none":
            raise UsageError("--reuse_from has no effect with --neg_q none")
        if self.examples_per_prompt != 5 and not self.examples:
            raise UsageError("--examples_per_prompt has no effect without --examples")
        if self.prices and (len(self.prices) != 2 or min(self.prices) < 0):
            raise UsageError(
                "--prices: give two numbers, of a million prompt tokens and of a million completion tokens"
            )


@dataclass(frozen=True)
class FromCorpusOptions:
    """Everything that the command line says."""

    documents: DocumentArguments
    output: FolderArguments
    kinds: KindArguments
    endpoint: EndpointArguments
    local: LocalModelArguments
    writing: WritingArguments
    checks: CheckArguments
    encoder: MiningEncoder
    search: SearchArguments
    sampling: Sampling
    filters: ScoreFilters
    reranker: RerankerArguments

    def __post_init__(self) -> None:
        if not self.endpoint.model and not self.local.local_model:
            raise UsageError("a model must write the queries: --model (with --base_url), or --local_model")
        if not self.encoder.encoder:
            raise UsageError("--encoder is missing: name the checkpoint that checks queries and finds negatives")
        if self.kinds.prices and not self.writing.dry_run:
            raise UsageError("--prices has no effect without --dry_run")
        # These refuse what their own commands refuse.
        self.query_options([])
        MiningOptions(
            InputArguments(["rows"]), MinedOutput("rows", with_scores=self.output.with_scores), self.encoder,
            replace(self.search, index_dir=None), self.sampling, self.filters, self.reranker,
        )  # fmt: skip

    def query_options(self, corpus: Sequence[str]) -> QueryOptions:
        """What ``query_generation`` is told: who writes, how it is checked, where a passage is searched."""
        return QueryOptions(
            ReuseArguments([], seed=self.sampling.seed), ReportedOutput("rows"), self.endpoint, self.local,
            self.writing, self.checks, RoundTripArguments(self.kinds.round_trip_top_k, list(corpus)), self.encoder,
            self.search,
        )  # fmt: skip
