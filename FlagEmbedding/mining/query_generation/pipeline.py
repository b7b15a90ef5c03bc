"""Queries for negatives (``neg_q``): ``python -m FlagEmbedding.mining.query_generation``.

Each different negative first gets a real query, one whose positive it is: free and exact. Those that are nobody's
positive are put before a language model, at an endpoint or on this machine; what it writes is checked, rejected
answers are asked for again, and what never passes is listed. Choices:

* A negative that answers its own row's query is a false negative. It gets no query here, and the report counts it.
* ``neg_q`` that is there already stays (``--replace`` finds all again); columns and order of the rows stay too.
* The output is a function of the input and of the cached answers. A killed run reads its input again, asks for what is
  not in the cache, and ends with the same bytes; the output appears whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from FlagEmbedding.mining.common.alignment import written
from FlagEmbedding.mining.common.jobs import check_output, progress, work_folder
from FlagEmbedding.mining.common.negative_table import NegativeTable, Waiting, fill, kept_queries, negative_table
from FlagEmbedding.mining.common.rows import data_files, json_line
from FlagEmbedding.mining.query_generation.answer_cache import Answer, AnswerCache, Task
from FlagEmbedding.mining.query_generation.arguments import CheckArguments, QueryOptions, ReuseArguments
from FlagEmbedding.mining.query_generation.checks import judge
from FlagEmbedding.mining.query_generation.endpoint import ChatEndpoint, Save
from FlagEmbedding.mining.query_generation.prompting import make_prompter
from FlagEmbedding.mining.query_generation.report import write_report
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.schema import Problems, parse_record, read_rows
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.io import atomic_open, sha256_file
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

if TYPE_CHECKING:
    from FlagEmbedding.mining.query_generation.round_trip import RoundTrip

logger = get_logger(__name__)


class Model(Protocol):
    """What writes queries: ``ChatEndpoint`` or ``LocalModel``."""

    name: str
    sent: int
    repeated: int

    def run(self, tasks: Iterator[Task], save: Save) -> Iterator[tuple[Task, str | None]]: ...


class Generation:
    """Rounds of asking and checking over the passages of ``table`` that wait for a query.

    Attributes:
        tokens: of prompts and answers, where the endpoint counts them; those of cached answers included.
        not_asked: passages that no request could be sent for any more (--max_requests).
    """

    def __init__(
        self, table: NegativeTable, cache: AnswerCache, model: Model, prompter: Callable[[str], str],
        checks: CheckArguments, round_trip: RoundTrip | None = None,
    ) -> None:  # fmt: skip
        self.table, self.cache, self.model, self.prompter = table, cache, model, prompter
        self.checks, self.round_trip = checks, round_trip
        self.tokens = Counter[str]()
        self.not_asked = self.unjudged = 0

    def task(self, passage: str, attempt: int) -> Task:
        """The question about a passage; its key is what the cache files the answer under."""
        prompt = self.prompter(passage)
        return Task(digest(self.model.name, prompt, attempt), prompt)

    def run(self, attempts: int) -> None:
        """Up to ``attempts`` rounds. Raises ``UserError`` when the model cannot be asked."""
        if self.round_trip is not None and self.table.count("open = 1"):
            self.round_trip.mark_present(self.table)
        for attempt in range(attempts):
            if not self.table.count("open = 1"):
                return
            self._ask(attempt)
            self._check(attempt)
            self._judge(attempt)

    def _ask(self, attempt: int) -> None:
        under_way: dict[str, Waiting] = {}

        def missing() -> Iterator[Task]:
            for item in self.table.waiting():
                task = self.task(item.passage, attempt)
                if self.cache.get(task.key) is None:
                    under_way[task.key] = item
                    yield task

        self.not_asked = 0
        answers = self.model.run(missing(), self.cache.put)
        for task, problem in progress(f"queries, attempt {attempt + 1}", answers, total=self.table.count("open = 1")):
            item = under_way.pop(task.key)
            if problem == "budget":
                self.not_asked += 1
            elif problem is not None:
                self.table.reject(item, attempt, problem, "no_answer")

    def _check(self, attempt: int) -> None:
        for item in self.table.waiting():
            answer = self.cache.get(self.task(item.passage, attempt).key)
            if answer is None:
                continue
            self._count(answer)
            query, reason = judge(answer, item.passage, self.checks)
            if reason is None:
                self.table.try_query(item, query)
            else:
                self.table.reject(item, attempt, query, reason)

    def _count(self, answer: Answer) -> None:
        self.tokens["prompt"] += answer.prompt_tokens or 0
        self.tokens["completion"] += answer.completion_tokens or 0
        self.tokens["answers"] += 1

    def _judge(self, attempt: int) -> None:
        if self.round_trip is None:
            for item in self.table.on_trial():
                self.table.accept(item, item.query)
            return
        for item in self.table.on_trial():
            if not item.present:
                self.unjudged += 1
                self.table.accept(item, item.query)
        for item, found in self.round_trip.judge(self.table.on_trial()):
            if found:
                self.table.accept(item, item.query)
            else:
                self.table.reject(item, attempt, item.query, "not_retrieved")


def write_rows(stream: Any, files: Sequence[Path], table: NegativeTable, a: ReuseArguments) -> Counter[str]:
    """Write every row with its ``neg_q``; returns how many negatives got theirs from where."""
    places = Counter[str]()
    for path in files:
        problems = Problems()
        for line, row in read_rows(path, problems):
            record = parse_record(row, str(path), line, problems)
            if record is None:
                continue
            queries = []
            for negative, kept in zip(record.neg, kept_queries(record, a.replace), strict=True):
                found, source = _queries_of(negative, record.query, kept, table, a.queries_per_negative)
                queries.append(found)
                places[source] += 1
                table.mark(negative, source)
            stream.write(json_line(_with_neg_q(row, record.neg, written(queries))))
        problems.raise_if_any()
    return places


def _queries_of(
    negative: str, own_query: str, kept: list[str], table: NegativeTable, most: int
) -> tuple[list[str], str]:
    if kept:
        return kept, "kept"
    real, answers_own = table.real(negative, own_query, most)
    if answers_own:
        return [], "own_query"
    if real:
        return real, "reused"
    query = table.generated(negative)
    return ([query], "generated") if query else ([], "none")


def _with_neg_q(row: dict[str, Any], negatives: list[str], neg_q: list[Any]) -> dict[str, Any]:
    """The row with ``neg_q`` where it was, or right after ``neg``, as published."""
    row = {**row, "neg": negatives}
    if "neg_q" in row:
        return {**row, "neg_q": neg_q}
    columns: dict[str, Any] = {}
    for key, value in row.items():
        columns[key] = value
        if key == "neg":
            columns["neg_q"] = neg_q
    return columns


def generate_queries(options: QueryOptions) -> dict[str, Any]:
    """Run the command; returns its record. Raises ``UserError``."""
    output, writing = options.output.path, options.writing
    if not writing.dry_run:
        check_output(output, options.output.overwrite)
    files, more = data_files(options.rows.input_file), data_files(options.rows.reuse_from)
    with work_folder(output) as work, negative_table(work / "negatives", options.rows.seed) as table:
        rows = fill(table, files, more, options.rows.replace)
        record = {"output": output.name, "rows": rows, "dry_run": writing.dry_run, "waiting": table.count()}
        if not options.generates:
            return _finish(options, files, table, {**record, "model": None})
        cache = AnswerCache(Path(writing.cache) if writing.cache else output.with_name(".neg_q_cache.sqlite"))
        with closing(cache):
            job = digest(str(output.resolve()), options.endpoint.model, [sha256_file(path) for path in files])
            prompter, attempts = make_prompter(writing.prompt, writing.language), options.checks.attempts
            if writing.dry_run:
                return {**record, **_estimate(options, table, cache, prompter, job)}
            if writing.temperature == 0 and attempts > 1:
                logger.info("--temperature 0 gives the same answer again: one attempt each")
                attempts = 1
            trip = _round_trip(options, files, work, cache) if table.count() else None
            generation = Generation(table, cache, _model(options, cache, job), prompter, options.checks, trip)
            generation.run(attempts)
            record["model"] = _describe(options, generation, cache.spent(job))
            _finish(options, files, table, record)
            cache.settle(job)
    return record


def _round_trip(options: QueryOptions, files: Sequence[Path], work: Path, cache: AnswerCache) -> RoundTrip | None:
    if not options.round_trip.round_trip_top_k:
        return None
    # Imported here because it brings torch, which reusing queries and asking an endpoint can do without.
    from FlagEmbedding.mining.query_generation.round_trip import open_round_trip

    return open_round_trip(options, files, work, cache)


def _model(options: QueryOptions, cache: AnswerCache, job: str) -> Model:
    if options.local.local_model:
        from FlagEmbedding.mining.query_generation.local_model import LocalModel

        return LocalModel(options.local, options.writing, options.encoder, options.rows.seed)
    return ChatEndpoint(options.endpoint, options.writing, lambda: cache.spend(job, options.endpoint.max_requests))


def _estimate(
    options: QueryOptions, table: NegativeTable, cache: AnswerCache, prompter: Callable[[str], str], job: str
) -> dict[str, Any]:
    """Requests and tokens of the first round, and what they may come to."""
    name, limit = options.endpoint.model or options.local.local_model or "", options.endpoint.max_requests
    prompts = (prompter(item.passage) for item in table.waiting())
    sizes = [estimated_tokens(prompt) for prompt in prompts if cache.get(digest(name, prompt, 0)) is None]
    return {
        "name": name, "calls": len(sizes), "cached": table.count() - len(sizes), "prompt_tokens": sum(sizes),
        "completion_tokens_at_most": len(sizes) * options.writing.max_tokens, "attempts": options.checks.attempts,
        "max_requests": limit, "already_sent": cache.spent(job) if limit is not None else 0,
    }  # fmt: skip


def estimated_tokens(text: str) -> int:
    """Tokens by rule of thumb, an endpoint's tokenizer being unknown: 4 ASCII characters, or 2 others, make one."""
    ascii_characters = sum(character.isascii() for character in text)
    return round(ascii_characters / 4 + (len(text) - ascii_characters) / 2)


def _describe(options: QueryOptions, generation: Generation, requests: int) -> dict[str, Any]:
    local, top_k = options.local.local_model, options.round_trip.round_trip_top_k
    return {
        "name": generation.model.name,
        "where": "this machine" if local else (options.endpoint.base_url or "OpenAI"),
        "requests": generation.model.sent if local else requests,
        "requests_of_this_run": generation.model.sent,
        "repeats_of_this_run": generation.model.repeated,
        "answers": generation.tokens["answers"],
        "prompt_tokens": generation.tokens["prompt"],
        "completion_tokens": generation.tokens["completion"],
        "not_asked": generation.not_asked,
        "round_trip": f"top {top_k} of {options.encoder.encoder}" if top_k else None,
        "round_trip_unjudged": generation.unjudged,
    }


def _finish(
    options: QueryOptions, files: Sequence[Path], table: NegativeTable, record: dict[str, Any]
) -> dict[str, Any]:
    """Write the rows and the report; the output is moved into place last."""
    output = options.output.path
    with clear_disk_errors(f"writing {output}"), atomic_open(output) as stream:
        record["negatives"] = dict(write_rows(stream, files, table, options.rows))
        record["different"] = table.sources()
        record["rejected"] = [list(found) for found in table.rejections()]
        record["left"] = table.count("open = 1")
        record["arguments"] = asdict(options)
        record["provenance"] = provenance()
        page = write_report(options.output.report(".neg_q"), record, table.listed() if options.generates else ())
    logger.info("%s: %d rows; report: %s", output, record["rows"], page)
    return record
