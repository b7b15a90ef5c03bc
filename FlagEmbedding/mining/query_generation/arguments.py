"""The command line of ``query_generation``, in groups that their readers take whole. Imports no torch (``--help``)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from FlagEmbedding.inference.arguments import DtypeName
from FlagEmbedding.mining.common.options import MiningEncoder, ReportedOutput, SearchArguments, check_least
from FlagEmbedding.mining.query_generation.redaction import strike
from FlagEmbedding.utils.cli import choice, internal, option, switch
from FlagEmbedding.utils.errors import UsageError

DESCRIPTION = "Give negatives the queries they answer (neg_q): real ones first, then a language model's."
EXAMPLES = """examples:
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
class ReuseArguments:
    """Rows."""

    input_file: list[str] = option(help="training rows: query, pos, neg, perhaps neg_q", metavar="FILE")
    reuse_from: list[str] = option([], "more rows whose real queries may be reused", metavar="FILE")
    replace: bool = switch(False, "find every neg_q again; otherwise those that are there stay")
    queries_per_negative: int = option(1, "at most this many real queries per negative")
    seed: int = option(42, "decides which of several real queries is taken, and seeds --local_model")

    def __post_init__(self) -> None:
        check_least(self, queries_per_negative=1)


@dataclass(frozen=True)
class EndpointArguments:
    """Language model at an endpoint (none: only real queries are used)."""

    model: str | None = option(None, "its name at the endpoint")
    base_url: str | None = option(None, "of any endpoint that speaks OpenAI's chat/completions; default: OpenAI's own")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the key", metavar="NAME")
    request_options: str = option("{}", "more fields of each request's body", metavar="JSON")
    concurrency: int = option(8, "requests under way at a time")
    timeout: float = option(
        60.0, "seconds without a byte that end a request; a whole answer may take five times as long"
    )
    max_retries: int = option(8, "repeats of a request after 429, 5xx, timeouts, malformed answers")
    backoff: float = option(1.0, "seconds before the first repeat; doubles with each, up to 60")
    max_requests: int | None = option(None, "hard limit on requests, repeats and killed runs of this command included")
    longest_retry_after: float = internal(600.0)  # a server that asks for more seconds ends the run

    def __post_init__(self) -> None:
        check_least(self, concurrency=1, max_retries=0, backoff=0, max_requests=0)
        if self.timeout <= 0:
            raise UsageError(f"--timeout must be above 0, got {self.timeout:g}")
        if self.base_url and not re.fullmatch(r"https?://[^/\s]+\S*", self.base_url):
            address = self.base_url.rpartition("@")[2]  # what stands before it may be a password
            raise UsageError(f"--base_url: expected http://… or https://…, got {strike(address)!r}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise UsageError("--api_key_env: expected the name of an environment variable; never write the key itself")
        for flag in ("base_url", "max_requests"):
            if getattr(self, flag) not in (None, "") and not self.model:
                raise UsageError(f"--{flag} has no effect without --model, the name of the model there")
        assert self.body is not None

    @cached_property
    def body(self) -> dict[str, Any]:
        """``request_options`` as JSON."""
        try:
            value = json.loads(self.request_options)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--request_options: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UsageError(f"--request_options: expected a JSON object, got {strike(self.request_options)[:60]!r}")
        return value


@dataclass(frozen=True)
class LocalModelArguments:
    """Language model on this machine, instead of an endpoint."""

    local_model: str | None = option(None, "a model for transformers (hub id or folder)", metavar="PATH")
    generation_batch_size: int = option(8, "prompts that it answers at a time")
    local_dtype: DtypeName = choice(DtypeName, "fp32", "to compute in")
    longest_prompt: int = internal(2_048)  # tokens

    def __post_init__(self) -> None:
        check_least(self, generation_batch_size=1)


@dataclass(frozen=True)
class WritingArguments:
    """What is asked, and how it is answered."""

    prompt: str | None = option(None, "text or file with {passage}, or a folder of {language}.txt; default: ours")
    language: str | None = option(None, "of the passages, a code such as ko; default: told from each passage")
    temperature: float = option(0.7, "of the answers")
    max_tokens: int = option(256, "per answer (a model that thinks needs more)")
    cache: str | None = option(None, "answers so far; default: .neg_q_cache.sqlite beside the output", metavar="FILE")
    dry_run: bool = switch(False, "print the number of requests and tokens, and do nothing")

    def __post_init__(self) -> None:
        check_least(self, temperature=0, max_tokens=1)


@dataclass(frozen=True)
class CheckArguments:
    """Checks of what the model writes."""

    attempts: int = option(3, "answers asked for until one passes; then the passage is listed")
    min_length: int = option(5, "characters of a query")
    max_length: int = option(200, "characters of a query")

    def __post_init__(self) -> None:
        check_least(self, attempts=1, min_length=1)
        if self.max_length < self.min_length:
            raise UsageError(f"--max_length {self.max_length} is below --min_length {self.min_length}")


@dataclass(frozen=True)
class RoundTripArguments:
    """Round trip: does the query bring its passage back?"""

    round_trip_top_k: int = option(0, "with --encoder: the rank its passage must reach", metavar="K")
    corpus: list[str] = option(
        [], "what is searched: JSON lines with text, files or folders; default: the passages of the rows",
        "--candidate_pool", metavar="PATH",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_least(self, round_trip_top_k=0)


@dataclass(frozen=True)
class QueryOptions:
    """Everything that the command line says."""

    rows: ReuseArguments
    output: ReportedOutput
    endpoint: EndpointArguments
    local: LocalModelArguments
    writing: WritingArguments
    checks: CheckArguments
    round_trip: RoundTripArguments
    encoder: MiningEncoder
    search: SearchArguments

    @property
    def generates(self) -> bool:
        """True when a model writes queries; otherwise real ones are reused and that is all."""
        return bool(self.endpoint.model or self.local.local_model)

    def __post_init__(self) -> None:
        if self.endpoint.model and self.local.local_model:
            raise UsageError("--model asks an endpoint, --local_model this machine: give one of them")
        if self.writing.dry_run and not self.generates:
            raise UsageError("--dry_run has no effect without --model or --local_model: real queries cost nothing")
        top_k = self.round_trip.round_trip_top_k
        if bool(self.encoder.encoder) != bool(top_k):
            raise UsageError("the round trip needs both: --encoder and --round_trip_top_k")
        if top_k and not self.generates:
            raise UsageError("--round_trip_top_k has no effect without --model or --local_model, which it checks")
