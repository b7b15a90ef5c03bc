"""Asking a language model behind any OpenAI-style endpoint: many at a time, patiently, within a budget.

OpenAI, Gemini, vLLM, llama.cpp and Ollama all speak this protocol (``chat/completions``). Choices:

* The ``openai`` client sends; retries are ours, so that each request is counted before it leaves, and so that one
  429 holds back all threads and not only the one that met it.
* Again after a while: 408, 409, 425, 429, 5xx, timeouts, broken connections, and answers that are not the protocol's.
  The wait doubles up to a minute, with jitter; a ``Retry-After`` is honoured where it is longer.
* Never again: a key that is refused, a model that is not there, a spent quota. These end the run; what was answered
  is in the cache. Any other refusal (400) concerns one passage, which is passed over.
* Ten passages that fail in a row, with no answer in between, end the run too.
* The key is read from the environment, travels in the header alone, and is struck out of whatever a server says.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from FlagEmbedding.mining.query_generation.answer_cache import Answer, Task
from FlagEmbedding.mining.query_generation.arguments import EndpointArguments, WritingArguments
from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

Save = Callable[[Sequence[tuple[str, Answer]]], None]

_AGAIN = {408, 409, 425, 429}
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
_LONGEST_WAIT = 60.0
_FAILURES_IN_A_ROW = 10


class EndpointError(UserError):
    """The endpoint cannot be used as it was named; no passage would fare better."""


class BudgetSpent(Exception):
    """No further request may be sent."""


class Refused(Exception):
    """This request gets no answer, others may."""


class ChatEndpoint:
    """A model behind an endpoint.

    Args:
        options: where and how to ask.
        writing: temperature and length of the answers.
        spend: called before every request that is sent; False says that the budget is used up.

    Attributes:
        name: the model's, under which answers are cached.
        sent, repeated: requests, and those among them that were repeats.

    Raises:
        UsageError: no key, or no ``openai`` package.
    """

    def __init__(self, options: EndpointArguments, writing: WritingArguments, spend: Callable[[], bool]) -> None:
        try:
            import openai
        except ImportError as error:
            raise UsageError("an endpoint needs the openai package: pip install 'FlagEmbedding[mining]'") from error
        self._openai = openai
        assert options.model is not None
        self.options, self.writing, self._spend = options, writing, spend
        self.name = options.model
        self._key = _read_key(options)
        self._client = openai.OpenAI(
            api_key=self._key, base_url=options.base_url, timeout=options.timeout, max_retries=0
        )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._not_before = 0.0
        self._failures = 0
        self.sent = self.repeated = 0

    def run(self, tasks: Iterable[Task], save: Save) -> Iterator[tuple[Task, str | None]]:
        """Ask about every task; yields ``(task, None)`` when its answer is saved, or ``(task, why not)``.

        Order is that of completion. ``save`` is called by the thread that got the answer, so an answer is safe as soon
        as it is here. When the budget is spent the rest comes back as ``(task, 'budget')``. Raises ``EndpointError``.
        """
        rest, under_way = iter(tasks), set[Future[tuple[Task, str | None]]]()
        pool = ThreadPoolExecutor(self.options.concurrency)
        try:
            while True:
                free = 2 * self.options.concurrency - len(under_way)
                under_way |= {pool.submit(self._one, task, save) for task in islice(rest, free)}
                if not under_way:
                    return
                finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            # Answers that are under way are awaited, for they are paid for and their threads save them.
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()

    def _one(self, task: Task, save: Save) -> tuple[Task, str | None]:
        try:
            answer = self._ask(task.prompt)
        except BudgetSpent:
            return task, "budget"
        except Refused as refusal:
            with self._lock:
                self._failures += 1
                hopeless = self._failures >= _FAILURES_IN_A_ROW
            if hopeless:
                raise EndpointError(
                    f"{_FAILURES_IN_A_ROW} passages in a row got no answer from {self._where()}, the last because: "
                    f"{refusal}; see to that and run the same command again, the answers so far are kept"
                ) from refusal
            return task, str(refusal)
        save([(task.key, answer)])
        with self._lock:
            self._failures = 0
        return task, None

    def _ask(self, prompt: str) -> Answer:
        reason = ""
        for repeat in range(self.options.max_retries + 1):
            self._hold()
            if not self._spend():
                raise BudgetSpent
            with self._lock:
                self.sent += 1
                self.repeated += repeat > 0
            found = self._send(prompt)
            if isinstance(found, Answer):
                return found
            reason, retry_after, everyone = found
            pause = _pause(repeat, retry_after, self.options.backoff)
            logger.debug("%s: again in %.1f s", reason, pause)
            if repeat < self.options.max_retries:
                self._wait(pause, everyone)
        raise Refused(f"{reason} ({self.options.max_retries + 1} times)")

    def _send(self, prompt: str) -> Answer | tuple[str, float | None, bool]:
        """The answer, or what speaks against it: reason, seconds the server asks for, whether all should wait."""
        openai, options = self._openai, self.options
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.name,
                messages=[{"role": "user", "content": prompt}],
                temperature=self.writing.temperature,
                max_tokens=self.writing.max_tokens,
                extra_body=options.body or None,
            )
            return parse_answer(response.text)
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APITimeoutError:
            return f"no answer within --timeout {options.timeout:g} s", None, False
        except (openai.APIConnectionError, OSError) as error:
            return self._plain(f"no connection to {self._where()}: {error.__cause__ or error}"), None, False
        except (ValueError, openai.APIError) as error:  # not the protocol's JSON
            return self._plain(f"malformed answer: {error}"), None, False

    def _refusal(self, error: Any) -> tuple[str, float | None, bool]:
        status, reason = error.status_code, self._plain(f"HTTP {error.status_code}: {_message(error)}")
        if any(word in json.dumps(error.body, default=str) for word in _SPENT):
            raise EndpointError(f"{self._where()}: {reason}; the answers so far are kept")
        if status in _AGAIN or status >= 500:
            retry_after = retry_seconds(error.response.headers)
            if retry_after is not None and retry_after > self.options.longest_retry_after:
                raise EndpointError(
                    f"{self._where()} asks to wait {retry_after:.0f} s ({reason}); run the same command again after "
                    "that, the answers so far are kept"
                )
            return reason, retry_after, status == 429 or retry_after is not None
        if status in (401, 403):
            raise EndpointError(f"{self._where()}: {reason}; put a valid key into {self.options.api_key_env}")
        if status == 404:
            raise EndpointError(f"{self._where()}: {reason}; check --base_url and --model {self.name}")
        raise Refused(reason)

    def _hold(self) -> None:
        """Wait until the endpoint may be asked again."""
        while (left := self._not_before - time.monotonic()) > 0 and not self._stopped.wait(min(left, 1.0)):
            pass
        if self._stopped.is_set():
            raise BudgetSpent

    def _wait(self, pause: float, everyone: bool) -> None:
        until = time.monotonic() + pause
        if everyone:
            with self._lock:
                self._not_before = max(self._not_before, until)
        self._stopped.wait(max(0.0, until - time.monotonic()))

    def _where(self) -> str:
        return str(self._client.base_url)

    def _plain(self, text: str) -> str:
        """One line of at most 300 characters without the key."""
        return " ".join(text.replace(self._key, "***").split())[:300]


def _read_key(options: EndpointArguments) -> str:
    key = os.environ.get(options.api_key_env, "").strip()
    if key:
        return key
    if options.base_url is None or options.api_key_env != EndpointArguments.api_key_env:
        raise UsageError(f"--api_key_env {options.api_key_env}: no such environment variable; put the key there")
    return "no-key-needed"  # a server of one's own, as vLLM, llama.cpp and Ollama are


def _pause(repeat: int, retry_after: float | None, backoff: float) -> float:
    """Seconds to wait: doubling up to a minute, jittered down to half of it; at least what the server asked for."""
    own: float = min(_LONGEST_WAIT, backoff * 2**repeat) * random.uniform(0.5, 1.0)
    return own if retry_after is None else max(own, retry_after)


def retry_seconds(headers: Any) -> float | None:
    """What ``retry-after-ms`` or ``Retry-After`` (seconds or a date, RFC 9110) ask for; None for neither."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) / unit)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            continue
    return None


def parse_answer(body: str) -> Answer:
    """The answer in a response's body. Raises ``ValueError`` for a body that is not the protocol's."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"expected choices[0].message.content, found {body[:80]!r}") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"expected text as content, found {type(text).__name__}")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (count if isinstance(count, int) else None for count in counts)
    return Answer(text or "", str(choice.get("finish_reason") or "stop"), prompt_tokens, completion_tokens)


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return str(body or error.response.reason_phrase)
