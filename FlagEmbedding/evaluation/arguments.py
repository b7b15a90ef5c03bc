"""Command lines of the evaluation steps: the published flags as they were, and the new ones. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from FlagEmbedding.indexing.arguments import IndexArguments, ModeArguments, ShareArguments, StoreArguments
from FlagEmbedding.inference.arguments import EncoderArguments, FfnPart, Pooling
from FlagEmbedding.utils.cli import choice, option, positional, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.modes import parse_modes

BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "
RESAMPLES = 10_000  # of the randomization test and of the bootstrap
Split = Literal["train", "dev", "test", "testA", "testB"]  # test: BEIR's


@dataclass(frozen=True)
class CollectionArguments:
    """Collection."""

    languages: list[str] = option(help="MIRACL languages, such as ko fa hi, or what --data_dir calls its own")
    split: Split = choice(Split, "dev", "queries; the corpus has no splits")
    data_dir: str | None = option(
        None, "folder in the hub's layout (miracl-corpus-v1.0-ko/…) or BEIR's (corpus.jsonl …); asked before the hub"
    )
    index_save_dir: str = option("./corpus-index", "indexes go to {this}/{encoder}/{lang}")


@dataclass(frozen=True)
class SearchArguments:
    """Search."""

    result_save_dir: str = option("./search_results", "run files go to {this}/{encoder}/{lang}.txt")
    max_query_length: int = option(512, "tokens per query; the rest is cut off")
    add_instruction: bool | None = switch(
        None, "put an instruction before every query; default: the checkpoint's own, if any"
    )
    query_instruction_for_retrieval: str | None = option(
        None, f"that instruction; by default the checkpoint's own, else {BGE_INSTRUCTION!r}", metavar="TEXT"
    )
    threads: int = option(1, "CPU threads of the search")
    hits: int = option(1000, "passages per query")
    index_type: str = option(
        "Flat", "Flat: exact; fp16, int8, binary: smaller vectors; else a faiss index_factory string such as HNSW32"
    )
    rescore: int | None = option(
        None, "candidates for each hit, scored again by the float vectors; default: 4 with fp16, int8, binary, else 0"
    )
    n_probe: int = option(32, "lists that an IVF index looks into")
    ef_search: int = option(128, "candidates that an HNSW index keeps (at least --hits)")
    overwrite: bool = switch(True, "False: keep a run file that is there")

    def __post_init__(self) -> None:
        if self.hits < 1 or self.threads < 1:
            raise UsageError(f"--hits {self.hits} --threads {self.threads}: both must be at least 1")
        if self.rescore is not None and self.rescore < 0:
            raise UsageError(f"--rescore must be 0 (none) or more, got {self.rescore}")
        if self.add_instruction is False and self.query_instruction_for_retrieval is not None:
            raise UsageError("--add_instruction False and --query_instruction_for_retrieval contradict each other")

    @property
    def query_instruction(self) -> str | None:
        """The text before each query, from the two flags that decide it."""
        if self.add_instruction and self.query_instruction_for_retrieval is None:
            return BGE_INSTRUCTION
        return self.query_instruction_for_retrieval


@dataclass(frozen=True)
class ScoreArguments:
    """Runs, judgments and results."""

    encoder: list[str] = option(help="model(s) as in step 1; --compare takes the first as the baseline")
    languages: list[str] = option(help="MIRACL languages, such as ko fa hi")
    split: Split = choice(Split, "dev", "which judgments")
    search_result_save_dir: str = option("./search_results", "runs are {this}/{encoder}/{lang}.txt")
    qrels_dir: str = option("../qrels", "folder (or, for one language, the file) of the judgments")
    data_dir: str | None = option(
        None, "folder in the hub's layout or BEIR's; also gives comparisons the texts of queries and passages"
    )
    index_save_dir: str | None = option(
        None, "of step 0: says where a run came from that has no record of step 1 beside it"
    )
    eval_result_save_dir: str = option("./eval_results", "results go to {this}/{encoder}.json and .md")
    metrics: list[str] = option(["ndcg@10"], "ndcg@k recall@k mrr@k map@k p@k")
    pooling_method: Pooling | None = choice(Pooling, None, "recorded; must agree with the run")
    normalize_embeddings: bool | None = switch(None, "recorded; must agree with the run")
    moe: FfnPart | None = choice(FfnPart, None, "accepted from older scripts; nothing depends on it here")
    modes: list[str] = option(
        ["dense"],
        "modes of step 1 whose runs are scored; several give a table in which each is tested against the first",
        "--mode",
    )
    compare: bool = switch(False, "test the encoders (and modes) against each other, two or more")
    compare_save_dir: str | None = option(None, "default: {eval_result_save_dir}/{first}_vs_{others}")
    resamples: int = option(RESAMPLES, "of the randomization test and of the bootstrap")
    seed: int = option(0, "of the same")
    cache_dir: str | None = option(None, "where the hub's files are kept")

    def __post_init__(self) -> None:
        if self.compare and len(self.encoder) * len(parse_modes(self.modes)) < 2:
            raise UsageError("--compare needs two or more models: --encoder base tuned --compare")
        if self.resamples < 100:
            raise UsageError(f"--resamples {self.resamples}: give 100 or more")


@dataclass(frozen=True)
class CompareArguments:
    """Runs of one query set."""

    runs: list[str] = positional("run files: qid Q0 docid rank score tag", metavar="RUN")
    qrels: str = option(help="qrels file: qid 0 docid grade, or BEIR's below its header")
    topics: str | None = option(None, "queries for the tables: qid, tab, text")
    names: list[str] = option([], "names of the runs; by default their file names")
    language: str = option("all", "what the query set is called in tables")
    metrics: list[str] = option(["ndcg@5", "ndcg@10", "recall@20"], "ndcg@k recall@k mrr@k map@k p@k")
    output_dir: str = option("./comparison", "tables, per-query file and chart go here")
    resamples: int = option(RESAMPLES, "of the randomization test and of the bootstrap")
    seed: int = option(0, "of the same")


@dataclass(frozen=True)
class DevArguments:
    """Dev collection.

    What a command measures a model on (:mod:`evaluation.on_dev`); without ``eval_data_dir`` it measures nothing.
    """

    eval_data_dir: str | None = option(None, "folder in MIRACL's layout; nDCG@10 is measured on its dev queries")
    eval_languages: list[str] = option([], "languages of it, such as ko fa hi")
    eval_split: Split = choice(Split, "dev", "which of its queries")
    eval_query_length: int = option(512, "tokens per query")
    eval_passage_length: int = option(512, "tokens per passage")
    query_instruction_for_retrieval: str | None = option(
        None, "text put before every query; default: what the checkpoint says", metavar="TEXT"
    )
    passage_instruction_for_retrieval: str | None = option(
        None, "text put before every passage; default: what the checkpoint says", metavar="TEXT"
    )

    def __post_init__(self) -> None:
        if bool(self.eval_data_dir) != bool(self.eval_languages):
            raise UsageError("--eval_data_dir and --eval_languages belong together: give both or neither")


@dataclass(frozen=True)
class EmbedOptions:
    """Step 0."""

    encoder: EncoderArguments
    collection: CollectionArguments
    index: IndexArguments
    share: ShareArguments = field(default_factory=ShareArguments)
    storing: StoreArguments = field(default_factory=StoreArguments)

    def __post_init__(self) -> None:
        if self.share.shards is None and not self.share.finish:
            return
        if self.index.overwrite:
            raise UsageError(
                "--overwrite True would remove what other workers encode; leave it out, or choose another "
                "--index_save_dir"
            )
        if self.storing.parts != ["dense"]:
            others = " ".join(part for part in self.storing.parts if part != "dense")
            raise UsageError(
                f"--shards and --finish share out dense vectors: run --modes {others} by itself, or under torchrun"
            )


@dataclass(frozen=True)
class SearchOptions:
    """Step 1."""

    encoder: EncoderArguments
    collection: CollectionArguments
    search: SearchArguments
    modes: ModeArguments = ModeArguments()

    def __post_init__(self) -> None:
        chosen = self.search
        if "dense" not in self.modes.parts and (chosen.index_type.lower() != "flat" or chosen.rescore is not None):
            given = "rescore" if chosen.rescore is not None else "index_type"
            raise UsageError(f"--{given} is of the dense index, which no mode of --modes searches: leave it out")
