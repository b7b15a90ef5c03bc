"""Command lines of the evaluation steps: the published flags as they were, and the new ones.

``--fp16`` stands bare or with a value, booleans take True/False/y/n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from FlagEmbedding.utils.cli import Parser, add_bool_flag
from FlagEmbedding.utils.errors import UsageError

BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "


@dataclass(frozen=True)
class EncoderArguments:
    """Which checkpoint, and how it is run; common to step 0 and step 1."""

    encoder: str
    pooling_method: str | None
    normalize_embeddings: bool
    fp16: bool
    dtype: str | None
    moe: str | None
    engine: str
    batch_size: int
    workers: int | None
    cache_dir: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class EncodeArguments(EncoderArguments):
    """step0-generate_embedding.py."""

    languages: list[str]
    split: str
    data_dir: str | None
    index_save_dir: str
    max_passage_length: int
    with_title: bool
    passage_instruction_for_retrieval: str | None
    allow_empty: bool
    shard_size: int
    overwrite: bool


@dataclass(frozen=True)
class SearchArguments(EncoderArguments):
    """step1-search_results.py."""

    languages: list[str]
    split: str
    data_dir: str | None
    index_save_dir: str
    result_save_dir: str
    max_query_length: int
    add_instruction: bool | None
    query_instruction_for_retrieval: str | None
    threads: int
    hits: int
    index_type: str
    n_probe: int
    ef_search: int
    overwrite: bool


def parse_encode_arguments(argv: Sequence[str] | None = None) -> EncodeArguments:
    """The command line of step 0."""
    parser = Parser("Embed the passages of MIRACL languages into an index on disk.")
    _add_encoder_flags(parser, batch_size=256)
    _add_data_flags(parser)
    add = parser.add_argument
    add("--max_passage_length", type=int, default=512, help="tokens of a passage; the rest is cut off")
    add_bool_flag(parser, "--with_title", help="embed title and text (MIRACL's own rule); published: text alone")
    add("--passage_instruction_for_retrieval", metavar="TEXT", help="text put before every passage")
    add_bool_flag(parser, "--allow_empty", help="embed passages without text instead of refusing them")
    add("--shard_size", type=int, default=2048, help="passages of a shard: sorted together, lost by a kill at most")
    add_bool_flag(parser, "--overwrite", help="encode anew what is there")
    return parser.parse(EncodeArguments, argv)  # type: ignore[no-any-return]


def parse_search_arguments(argv: Sequence[str] | None = None) -> SearchArguments:
    """The command line of step 1."""
    parser = Parser("Search the index of MIRACL languages for their queries; writes TREC run files.")
    _add_encoder_flags(parser, batch_size=256)
    _add_data_flags(parser)
    add = parser.add_argument
    add("--result_save_dir", default="./search_results", help="run files go to {this}/{encoder}/{lang}.txt")
    add("--max_query_length", type=int, default=512, help="tokens of a query; the rest is cut off")
    add_bool_flag(parser, "--add_instruction", default=None, help="put an instruction before every query")  # type: ignore[arg-type]
    add("--query_instruction_for_retrieval", metavar="TEXT", help=f"that instruction; by default {BGE_INSTRUCTION!r}")
    add("--threads", type=int, default=1, help="CPU threads of the search")
    add("--hits", type=int, default=1000, help="passages a query")
    add("--index_type", default="Flat", help="Flat: exact; else a faiss index_factory string such as HNSW32, SQ8")
    add("--n_probe", type=int, default=32, help="lists that an IVF index looks into")
    add("--ef_search", type=int, default=128, help="candidates that an HNSW index keeps (at least --hits)")
    add_bool_flag(parser, "--overwrite", default=True, help="False: keep a run file that is there")
    return parser.parse(SearchArguments, argv)  # type: ignore[no-any-return]


def query_instruction(arguments: SearchArguments) -> str | None:
    """The text before each query, from the two flags that decide it."""
    text = arguments.query_instruction_for_retrieval
    if arguments.add_instruction is False and text is not None:
        raise UsageError("--add_instruction False and --query_instruction_for_retrieval contradict each other")
    if arguments.add_instruction and text is None:
        return BGE_INSTRUCTION
    return text


def _add_encoder_flags(parser: Parser, batch_size: int) -> None:
    add = parser.add_argument
    add("--encoder", required=True, help="hub id or folder of the checkpoint")
    add("--pooling_method", choices=["cls", "mean"], help="default: what the checkpoint says, else cls")
    add_bool_flag(parser, "--normalize_embeddings", default=True, help="L2-normalise the vectors")
    add_bool_flag(parser, "--fp16", help="half precision: fp16 on a GPU, --dtype auto on a CPU")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], help="default fp32; auto: bf16 where the hardware has it")
    add("--moe", choices=["intermediate", "output"], help="not needed; must agree with the checkpoint")
    add("--engine", choices=["packed", "padded"], default="packed", help="padded: transformers' own forward")
    add("--batch_size", type=int, default=batch_size, help="at most this many texts of full length at a time")
    add("--workers", type=int, help="processes that tokenise ahead; 0: a thread. Default: 0, on a GPU up to 8")
    add("--cache_dir", help="where the hub's files are kept")
    add_bool_flag(parser, "--trust_remote_code", help="run code that comes with the checkpoint")


def _add_data_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--languages", nargs="+", required=True, help="MIRACL languages, such as ko fa hi")
    add("--split", choices=["train", "dev", "testA", "testB"], default="dev", help="queries; the corpus has no splits")
    add("--data_dir", help="folder in the hub's layout (miracl-corpus-v1.0-ko/…); asked before the hub")
    add("--index_save_dir", default="./corpus-index", help="indexes go to {this}/{encoder}/{lang}")
