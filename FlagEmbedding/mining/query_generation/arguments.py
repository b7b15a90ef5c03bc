"""The command line of ``query_generation``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from FlagEmbedding.mining.hard_negatives.arguments import Formatter, add_encoder_flags
from FlagEmbedding.utils.cli import Parser, add_bool_flag
from FlagEmbedding.utils.errors import UsageError

_EXAMPLES = """examples:
  real queries alone, free of charge:
    python -m FlagEmbedding.mining.query_generation --input_file mined.jsonl --output_file train_data/ko.jsonl
  then Gemini for the rest, 1,000 requests at most (first with --dry_run to see what it comes to):
    GEMINI_API_KEY=… python -m FlagEmbedding.mining.query_generation --input_file mined.jsonl --output_file ko.jsonl \\
        --base_url https://generativelanguage.googleapis.com/v1beta/openai/ --model gemini-2.5-flash \\
        --api_key_env GEMINI_API_KEY --max_requests 1000
  a server of one's own (vLLM, llama.cpp, Ollama), and each query must find its passage among the first 10:
    python -m FlagEmbedding.mining.query_generation --input_file mined.jsonl --output_file ko.jsonl \\
        --base_url http://localhost:8000/v1 --model my-model --encoder BAAI/bge-m3 --round_trip_top_k 10
"""


@dataclass(frozen=True)
class QueryArguments:
    """What the command line says; the help texts explain each."""

    input_file: list[str]
    reuse_from: list[str]
    output_file: str
    report_dir: str | None
    overwrite: bool
    replace: bool
    queries_per_negative: int
    seed: int
    base_url: str | None
    model: str | None
    api_key_env: str
    request_options: dict[str, Any]
    concurrency: int
    timeout: float
    max_retries: int
    backoff: float
    max_requests: int | None
    local_model: str | None
    generation_batch_size: int
    local_dtype: str
    prompt: str | None
    language: str | None
    temperature: float
    max_tokens: int
    cache: str | None
    dry_run: bool
    attempts: int
    min_length: int
    max_length: int
    corpus: list[str]
    round_trip_top_k: int
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
    threads: int

    @property
    def generates(self) -> bool:
        """True when a model writes queries; otherwise real ones are reused and that is all."""
        return bool(self.model or self.local_model)


def parse_query_arguments(argv: Sequence[str] | None = None) -> QueryArguments:
    """Parse and check. Raises ``UsageError``."""
    parser = Parser("Give negatives the queries they answer (neg_q): real ones first, then a language model's.")
    parser.formatter_class = Formatter
    parser.epilog = _EXAMPLES
    _add_files(parser)
    _add_model(parser)
    _add_checks(parser)
    add_encoder_flags(parser)
    arguments = parser.parse(QueryArguments, argv)
    for complaint in _complaints(arguments):
        raise UsageError(complaint)
    return arguments


def _add_files(parser: Parser) -> None:
    group = parser.add_argument_group("rows")
    add = group.add_argument
    add("--input_file", nargs="+", required=True, metavar="FILE", help="training rows: query, pos, neg, perhaps neg_q")
    add("--reuse_from", nargs="+", default=[], metavar="FILE", help="more rows whose real queries may be reused")
    add("--output_file", required=True, metavar="FILE", help="the same rows with neg_q")
    add("--report_dir", help="where the report and the list of rejected queries go; default: reports/ beside the file")
    add_bool_flag(group, "--overwrite", help="replace an output that is there")
    add_bool_flag(group, "--replace", help="find every neg_q anew; otherwise those that are there stay")
    add("--queries_per_negative", type=int, default=1, help="at most this many real queries a negative")
    add("--seed", type=int, default=42, help="decides which of several real queries is taken, and seeds --local_model")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("language model (none: only real queries are used)")
    add = group.add_argument
    add("--model", help="its name at the endpoint")
    add("--base_url", help="of any endpoint that speaks OpenAI's chat/completions; default: OpenAI's own")
    add("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key")
    add("--request_options", type=_json_object, default={}, metavar="JSON", help="more fields of each request's body")
    add("--concurrency", type=int, default=8, help="requests under way at a time")
    add("--timeout", type=float, default=60.0, help="seconds that an answer may take")
    add("--max_retries", type=int, default=8, help="repeats of a request after 429, 5xx, timeouts, malformed answers")
    add("--backoff", type=float, default=1.0, help="seconds before the first repeat; doubles with each, up to 60")
    add("--max_requests", type=int, help="hard limit on requests, repeats and killed runs of this command included")
    add("--local_model", metavar="PATH", help="instead of an endpoint: a model for transformers (hub id or folder)")
    add("--generation_batch_size", type=int, default=8, help="prompts that --local_model answers at a time")
    add("--local_dtype", choices=["auto", "fp32", "bf16", "fp16"], default="fp32", help="of --local_model")
    add("--prompt", help="a file or text with {passage}, or a folder of {language}.txt; default: the package's own")
    add("--language", help="code of the passages' language (chooses the prompt); default: by each passage's script")
    add("--temperature", type=float, default=0.7, help="of the answers")
    add("--max_tokens", type=int, default=256, help="of an answer (a model that thinks needs more)")
    add("--cache", metavar="FILE", help="answers so far; default: .neg_q_cache.sqlite beside the output")
    add_bool_flag(group, "--dry_run", help="print the number of requests and tokens, and do nothing")


def _add_checks(parser: Parser) -> None:
    group = parser.add_argument_group("checks of what the model writes")
    add = group.add_argument
    add("--attempts", type=int, default=3, help="answers asked for until one passes; then the passage is listed")
    add("--min_length", type=int, default=5, help="characters of a query")
    add("--max_length", type=int, default=200, help="characters of a query")
    add("--round_trip_top_k", type=int, default=0, metavar="K", help="with --encoder: the rank its passage must reach")
    add(
        "--corpus", nargs="+", default=[], metavar="PATH",
        help="what is searched: JSON lines with text, files or folders; default: the passages of the rows",
    )  # fmt: skip


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _complaints(a: QueryArguments) -> list[str]:
    found = []
    if a.model and a.local_model:
        found.append("--model asks an endpoint, --local_model this machine: give one of them")
    if a.base_url and not a.model:
        found.append("--base_url has no effect without --model, the name of the model there")
    if a.dry_run and not a.generates:
        found.append("--dry_run has no effect without --model or --local_model: real queries cost nothing")
    if bool(a.encoder) != bool(a.round_trip_top_k):
        found.append("the round trip needs both: --encoder and --round_trip_top_k")
    if a.round_trip_top_k and not a.generates:
        found.append("--round_trip_top_k has no effect without --model or --local_model: real queries are not checked")
    if a.max_requests is not None and not a.model:
        found.append("--max_requests has no effect without --model")
    least = {
        "queries_per_negative": 1, "concurrency": 1, "attempts": 1, "max_tokens": 1, "min_length": 1,
        "generation_batch_size": 1, "max_retries": 0, "round_trip_top_k": 0, "temperature": 0, "backoff": 0,
    }  # fmt: skip
    for name, smallest in least.items():
        if getattr(a, name) < smallest:
            found.append(f"--{name} must be at least {smallest}, got {getattr(a, name)}")
    if a.timeout <= 0:
        found.append(f"--timeout must be above 0, got {a.timeout:g}")
    if a.max_requests is not None and a.max_requests < 0:
        found.append(f"--max_requests must be at least 0, got {a.max_requests}")
    if a.max_length < a.min_length:
        found.append(f"--max_length {a.max_length} is below --min_length {a.min_length}")
    if a.fp16 and a.dtype is not None:
        found.append("--fp16 and --dtype say the same thing: give one of them")
    return found
