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

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from FlagEmbedding.mining.common.alignment import written
from FlagEmbedding.mining.common.jobs import check_output, progress, work_folder
from FlagEmbedding.mining.common.negative_table import NegativeTable, Waiting, fill, kept_queries, negative_table
from FlagEmbedding.mining.common.rows import KeySet, data_files, json_line
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache, Task
from FlagEmbedding.mining.query_generation.arguments import CheckArguments, QueryOptions, ReuseArguments
from FlagEmbedding.mining.query_generation.checks import bare, judge
from FlagEmbedding.mining.query_generation.endpoint import ChatEndpoint, Save
from FlagEmbedding.mining.query_generation.prompting import make_prompter
from FlagEmbedding.mining.query_generation.redaction import strike_all
from FlagEmbedding.mining.query_generation.report import write_report
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.schema import Problems, parse_record, read_rows
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.io import atomic_text, sha256_file
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import printable
from FlagEmbedding.utils.provenance import provenance
from FlagEmbedding.utils.texts import text_key

if TYPE_CHECKING:
    from FlagEmbedding.mining.query_generation.round_trip import RoundTrip

logger = get_logger(__name__)

_SHOWN = 500  # characters of an answer in the list of those rejected; the cache has all of it


class Model(Protocol):
    """What writes queries: ``ChatEndpoint`` or ``LocalModel``."""

    name: str
    sent: int
    repeated: int

    def run(self, tasks: Iterator[Task], save: Save) -> Iterator[tuple[Task, str | None]]: ...


def make_task(model: str, prompt: str, attempt: int) -> Task:
    """A question to a model; its key is what the cache files the answer under."""
    return Task(digest(model, prompt, attempt), prompt)


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
        self._taken = KeySet()  # queries of the rows, and those that a model wrote
        for query in table.real_queries():
            self._taken.add(text_key(bare(query)))

    def run(self, attempts: int) -> None:
        """Up to ``attempts`` rounds. Raises ``UserError`` when the model cannot be asked."""
        if self.round_trip is not None and self.table.count("open = 1"):
            self.round_trip.mark_present(self.table)
        for attempt in range(attempts):
            if not self.table.count("open = 1"):
                return
            self._ask(attempt)
            self._check(attempt)
            self._reject_repeated(attempt)
            self._judge(attempt)

    def _task(self, passage: str, attempt: int) -> Task:
        return make_task(self.model.name, self.prompter(passage), attempt)

    def _ask(self, attempt: int) -> None:
        under_way: dict[str, Waiting] = {}

        def missing() -> Iterator[Task]:
            for item in self.table.waiting():
                task = self._task(item.passage, attempt)
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
            task = self._task(item.passage, attempt)
            answer = self.cache.get(task.key)
            if answer is None:
                continue
            tokens = {"prompt": answer.prompt_tokens or 0, "completion": answer.completion_tokens or 0, "answers": 1}
            self.tokens.update(tokens)
            query, reason = judge(answer, item.passage, self.checks, task.prompt)
            if reason is None:
                self.table.try_query(item, query)
            else:
                self.table.reject(item, attempt, printable(query[:_SHOWN]), reason)

    def _reject_repeated(self, attempt: int) -> None:
        """Reject queries of the rows, and what came for several passages: it asks about none of them in particular."""
        repeated = KeySet()
        for item in self.table.on_trial():
            key = text_key(bare(item.query))
            if not self._taken.add(key):
                repeated.add(key)
        for item in self.table.on_trial():
            if not repeated.add(text_key(bare(item.query))):
                self.table.reject(item, attempt, item.query, "repeated")

    def _judge(self, attempt: int) -> None:
        for item in self.table.on_trial():
            if self.round_trip is None or not item.present:
                self.unjudged += self.round_trip is not None
                self.table.accept(item, item.query)
        if self.round_trip is None:
            return
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
            stream.write(json_line(_with_neg_q({**row, "neg": record.neg}, written(queries))))
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


def _with_neg_q(row: dict[str, Any], neg_q: list[Any]) -> dict[str, Any]:
    """The row with ``neg_q`` where it was, or right after ``neg``, as published."""
    columns = list(row)
    if "neg_q" not in row:
        columns.insert(columns.index("neg") + 1, "neg_q")
    return {column: neg_q if column == "neg_q" else row[column] for column in columns}


def generate_queries(options: QueryOptions) -> dict[str, Any]:
    """Run the command; returns its record. Raises ``UserError``."""
    output, writing, attempts = options.output.path, options.writing, options.checks.attempts
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
            prompter = make_prompter(writing.prompt, writing.language)
            if writing.dry_run:
                return {**record, **_estimate(options, table, cache, prompter, job)}
            if writing.temperature == 0 and attempts > 1:
                logger.info("--temperature 0 gives the same answer again: one attempt each")
                attempts = 1
            trip = None
            if options.round_trip.round_trip_top_k and table.count():
                # Imported here because it brings torch, which reusing queries and asking an endpoint can do without.
                from FlagEmbedding.mining.query_generation.round_trip import RoundTrip

                trip = RoundTrip(options, files, work, cache)
            generation = Generation(table, cache, open_model(options, cache, job), prompter, options.checks, trip)
            generation.run(attempts)
            record["model"] = _describe(options, generation, cache.spent(job))
            record = _finish(options, files, table, record)
            cache.settle(job)
    return record


def open_model(options: QueryOptions, cache: AnswerCache, job: str) -> Model:
    """What writes; an endpoint's requests are counted under ``job``. Raises ``UserError``."""
    if options.local.local_model:
        from FlagEmbedding.mining.query_generation.local_model import LocalModel

        return LocalModel(options.local, options.writing, options.encoder, options.rows.seed)
    return ChatEndpoint(options.endpoint, options.writing, lambda: cache.spend(job, options.endpoint.max_requests))


def _estimate(
    options: QueryOptions, table: NegativeTable, cache: AnswerCache, prompter: Callable[[str], str], job: str
) -> dict[str, Any]:
    """Requests and tokens of the first round, and what they may come to."""
    name, limit = options.endpoint.model or options.local.local_model or "", options.endpoint.max_requests
    tasks = (make_task(name, prompter(item.passage), 0) for item in table.waiting())
    sizes = [estimated_tokens(task.prompt) for task in tasks if cache.get(task.key) is None]
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
    local, top_k, model = options.local.local_model, options.round_trip.round_trip_top_k, generation.model
    return {
        "name": model.name, "where": "this machine" if local else (options.endpoint.base_url or "OpenAI"),
        "requests": model.sent if local else requests, "requests_of_this_run": model.sent,
        "repeats_of_this_run": model.repeated, "answers": generation.tokens["answers"],
        "prompt_tokens": generation.tokens["prompt"], "completion_tokens": generation.tokens["completion"],
        "not_asked": generation.not_asked, "round_trip_unjudged": generation.unjudged,
        "round_trip": f"top {top_k} of {options.encoder.encoder}" if top_k else None,
    }  # fmt: skip


def _finish(
    options: QueryOptions, files: Sequence[Path], table: NegativeTable, record: dict[str, Any]
) -> dict[str, Any]:
    """Write the rows and the report, which is returned; the output is moved into place last."""
    output, key = options.output.path, os.environ.get(options.endpoint.api_key_env)
    with clear_disk_errors(f"writing {output}"), atomic_text(output) as stream:
        record["negatives"] = dict(write_rows(stream, files, table, options.rows))
        record |= {
            "different": table.sources(), "rejected": [list(found) for found in table.rejections()],
            "left": table.count("open = 1"), "arguments": asdict(options), "provenance": provenance(),
        }  # fmt: skip
        record = strike_all(record, key)
        page = write_report(options.output.report(".neg_q"), record, table.listed() if options.generates else ())
    logger.info("%s: %d rows; report: %s", output, record["rows"], page)
    return record
