"""The command line of ``hard_negatives``: upstream's flags by their names, and ours.

A flag left alone that the index has an opinion on (length, instruction, title) follows the index.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from FlagEmbedding.mining.hard_negatives.filters import Sampling, ScoreFilters, parse_range
from FlagEmbedding.utils.cli import Parser, add_bool_flag
from FlagEmbedding.utils.errors import UsageError

_EXAMPLES = """examples:
  from MIRACL's raw train split (files on disk, or the hub):
    python -m FlagEmbedding.mining.hard_negatives --data_dir ./miracl --language ko --split train \\
        --encoder BAAI/bge-m3 --range_for_sampling 2-30 --negative_number 8 --output_file train_data/ko.jsonl
  from training rows (neg may be missing) and any corpus of {"text": …} lines, with filters:
    python -m FlagEmbedding.mining.hard_negatives --input_file rows.jsonl --corpus corpus.jsonl \\
        --encoder BAAI/bge-m3 --relative_margin 0.05 --output_file train_data/mined.jsonl
"""


@dataclass(frozen=True)
class MiningArguments:
    """What the command line says; the help texts explain each."""

    input_file: list[str]
    data_dir: str | None
    language: str | None
    split: str
    corpus: list[str]
    output_file: str
    report_dir: str | None
    overwrite: bool
    encoder: str | None
    pooling_method: str | None
    normalize_embeddings: bool
    fp16: bool
    dtype: str | None
    moe: str | None
    engine: str
    batch_size: int
    workers: int
    cache_dir: str | None
    trust_remote_code: bool
    query_max_length: int
    passage_max_length: int | None
    query_instruction_for_retrieval: str | None
    passage_instruction_for_retrieval: str | None
    with_title: bool | None
    index_dir: str | None
    index_save_dir: str
    search_batch_size: int
    threads: int
    range_for_sampling: str
    negative_number: int
    sampling_strategy: str
    fill: str
    random_negatives: bool
    seed: int
    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None
    cross_encoder: str | None
    cross_encoder_max_length: int
    cross_encoder_batch_size: int
    with_scores: bool

    def sampling(self) -> Sampling:
        """Window, number, filters and seed."""
        first, last = parse_range(self.range_for_sampling)
        filters = ScoreFilters(self.absolute_margin, self.relative_margin, self.max_score, self.min_score)
        return Sampling(
            first, last, self.negative_number, self.sampling_strategy, self.fill, self.seed, filters,  # type: ignore[arg-type]
        )  # fmt: skip


def parse_mining_arguments(argv: Sequence[str] | None = None) -> MiningArguments:
    """Parse and check. Raises ``UsageError``."""
    parser = Parser("Mine hard negatives (ANCE): rows of query, pos, neg for training.")
    parser.formatter_class = Formatter
    parser.epilog = _EXAMPLES
    _add_data(parser)
    add_encoder_flags(parser)
    _add_sampling(parser)
    arguments = parser.parse(MiningArguments, argv)
    for complaint in _complaints(arguments):
        raise UsageError(complaint)
    return arguments


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the examples keep their lines."""


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("queries, positives and corpus")
    add = group.add_argument
    add("--input_file", nargs="+", default=[], metavar="FILE", help="training rows: query, pos, perhaps neg and neg_q")
    add("--data_dir", help="folder in MIRACL's layout, asked before the hub (with --language)")
    add("--language", help="MIRACL language: topics and qrels of --split, and its corpus")
    add("--split", choices=["train", "dev"], default="train", help="which topics and qrels")
    add(
        "--corpus", "--candidate_pool", nargs="+", default=[], metavar="PATH",
        help="JSON lines with text (docid and title optional), files or folders; default: MIRACL's corpus of the "
        "language, or the passages of the rows themselves",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_file", required=True, metavar="FILE", help="training rows with their negatives")
    add("--report_dir", help="where the report goes (FILE's name, .json and .md); default: reports/ beside the file")
    add_bool_flag(group, "--with_scores", help="write pos_scores and neg_scores (teacher scores for distillation)")
    add_bool_flag(group, "--overwrite", help="replace an output that is there")


def add_encoder_flags(parser: Parser) -> None:
    """The flags of encoder, index and search; the names are the fields of ``MiningArguments``."""
    group = parser.add_argument_group("encoder, index and search")
    add = group.add_argument
    add("--encoder", "--model_name_or_path", "--embedder_name_or_path", dest="encoder", help="hub id or folder")
    add("--pooling_method", choices=["cls", "mean"], help="default: what the checkpoint says, else cls")
    add_bool_flag(group, "--normalize_embeddings", default=True, help="L2-normalise the vectors")
    add_bool_flag(group, "--fp16", "--use_fp16", dest="fp16", help="fp16 on a GPU, --dtype auto on a CPU")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], help="default fp32")
    add("--moe", choices=["intermediate", "output"], help="not needed; must agree with the checkpoint")
    add("--engine", choices=["packed", "padded"], default="packed", help="padded: transformers' own forward")
    add("--batch_size", type=int, default=256, help="at most this many texts of full length at a time")
    add("--workers", type=int, default=0, help="processes that tokenise ahead; 0: a thread")
    add("--cache_dir", help="where the hub's files are kept")
    add_bool_flag(group, "--trust_remote_code", help="run code that comes with the checkpoint")
    add("--query_max_length", "--embedder_query_max_length", type=int, default=512, help="tokens of a query")
    add(
        "--passage_max_length", "--embedder_passage_max_length", "--max_passage_length", type=int,
        dest="passage_max_length", help="tokens of a passage; default: as the index was made, else 512",
    )  # fmt: skip
    add("--query_instruction_for_retrieval", metavar="TEXT", help="text put before every query")
    add("--passage_instruction_for_retrieval", metavar="TEXT", help="text put before every passage")
    add_bool_flag(group, "--with_title", default=None, help="passages are title and text")  # type: ignore[arg-type]
    add("--index_dir", help="an index folder of step 0 to reuse, or where to build one")
    add(
        "--index_save_dir", default="./corpus-index", help="without --index_dir: {this}/{encoder}/{language}, as step 0"
    )
    add("--search_batch_size", type=int, default=2048, help="queries that are embedded and searched together")
    add("--threads", type=int, default=1, help="CPU threads of the search")
    add_bool_flag(
        group, "--use_gpu_for_searching", help="accepted as published: the search runs where the encoder does"
    )


def _add_sampling(parser: Parser) -> None:
    group = parser.add_argument_group("which negatives")
    add = group.add_argument
    add("--range_for_sampling", default="10-210", metavar="A-B", help="ranks A+1 to B of the search")
    add("--negative_number", type=int, default=15, help="negatives a query")
    add("--sampling_strategy", choices=["random", "top"], default="random", help="which of those in the window")
    add(
        "--fill", choices=["random", "next", "none"], default="random",
        help="where too few are left: random passages of the corpus, the ranks below the window, or nothing",
    )  # fmt: skip
    add_bool_flag(group, "--random_negatives", help="no mining: every negative at random from the corpus")
    add("--seed", type=int, default=42, help="of all choices")
    group = parser.add_argument_group("filters (as sentence-transformers' mine_hard_negatives)")
    add = group.add_argument
    add("--absolute_margin", type=float, help="leave out what scores within this of the query's lowest positive")
    add(
        "--relative_margin",
        type=float,
        help="the same, as a share of the positive's score: 0.05 keeps the rest below 95 %%",
    )
    add("--max_score", type=float, help="leave out what scores above this")
    add("--min_score", type=float, help="leave out what scores below this")
    add("--cross_encoder", help="a reranker whose scores the filters see (one label, sigmoid)")
    add("--cross_encoder_max_length", type=int, default=512, help="tokens of a pair")
    add("--cross_encoder_batch_size", type=int, default=32, help="pairs at a time")


def _complaints(a: MiningArguments) -> list[str]:
    found = []
    if bool(a.input_file) == bool(a.language):
        found.append("give either --input_file (training rows) or --language (MIRACL topics and qrels)")
    if a.data_dir and not a.language:
        found.append("--data_dir has no effect without --language")
    at_least_one = ("negative_number", "search_batch_size", "threads", "batch_size", "cross_encoder_batch_size")
    found += [f"--{name} must be at least 1, got {getattr(a, name)}" for name in at_least_one if getattr(a, name) < 1]
    if a.fp16 and a.dtype is not None:
        found.append("--fp16 and --dtype say the same thing: give one of them")
    for name in ("absolute_margin", "relative_margin"):
        if (getattr(a, name) or 0.0) < 0:
            found.append(f"--{name} must not be negative, got {getattr(a, name)}")
    filters = a.sampling().filters.given()
    if a.random_negatives:
        useless = [*filters, *(name for name in ("cross_encoder", "with_scores", "index_dir") if getattr(a, name))]
        if useless:
            found.append(f"--{useless[0]} has no effect with --random_negatives, which scores nothing: leave it out")
    else:
        if a.encoder is None:
            found.append("--encoder is missing: name the checkpoint that embeds queries and passages")
        first, last = a.sampling().first, a.sampling().last
        if a.negative_number > last - first:
            found.append(
                f"--negative_number {a.negative_number} is more than --range_for_sampling {a.range_for_sampling} holds "
                f"({last - first}): widen the window"
            )
        if a.cross_encoder and not filters and not a.with_scores:
            found.append("--cross_encoder has no effect without a filter (such as --max_score) or --with_scores")
    if a.max_score is not None and a.min_score is not None and a.max_score < a.min_score:
        found.append(f"--max_score {a.max_score} is below --min_score {a.min_score}: nothing would be left")
    return found
