"""Asking a language model behind any OpenAI-style endpoint: many at a time, patiently, within a budget.

OpenAI, Gemini, vLLM, llama.cpp and Ollama all speak this protocol (``chat/completions``). Choices:

* The ``openai`` client sends. Retries are ours, so that each request is counted before it leaves and one 429 holds back
  all tasks.
* Again after a while: 408, 409, 425, 429, 5xx, timeouts, broken connections, and answers that are not the protocol's.
  The wait doubles up to a minute, with jitter; a ``Retry-After`` is honored where it is longer.
* Never again: a key that is refused, a model that is not there, a spent quota, a redirect to another server. These end
  the run; what was answered is in the cache. Any other refusal (400) concerns one passage, which is passed over.
* Ten passages that fail in a row, with no answer in between, end the run too.
* An answer that never ends is broken off: by its bytes, and by a deadline of five times ``--timeout``.
* The key is read from the environment, travels in the header alone, and is struck out of whatever a server says.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from FlagEmbedding.mining.query_generation.answer_cache import Answer, Task
from FlagEmbedding.mining.query_generation.arguments import EndpointArguments, WritingArguments
from FlagEmbedding.mining.query_generation.redaction import strike
from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import one_line

logger = get_logger(__name__)

Save = Callable[[Sequence[tuple[str, Answer]]], None]

_AGAIN = {408, 409, 425, 429}
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
_LONGEST_WAIT = 60.0
_FAILURES_IN_A_ROW = 10
_LARGEST_ANSWER = 1 << 20  # bytes, thoughts and JSON included
_WHOLE_ANSWER = 5  # times --timeout, which is for each piece of it


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
        assert options.model is not None
        self._openai, self.options, self.writing, self._spend = openai, options, writing, spend
        self.name, self._key = options.model, _read_key(options)
        self._client: Any = None
        self._stopped: Any = None
        self._not_before, self._failures = 0.0, 0
        self.sent = self.repeated = 0

    def run(self, tasks: Iterable[Task], save: Save) -> Iterator[tuple[Task, str | None]]:
        """Ask about every task; yields ``(task, None)`` when its answer is saved, or ``(task, why not)``.

        Order is that of completion; ``save`` is called as soon as an answer has come. When the budget is spent the rest
        comes back as ``(task, 'budget')``. Raises ``EndpointError``.
        """
        from anyio import Event
        from anyio.from_thread import start_blocking_portal

        rest, under_way = iter(tasks), set[Future[tuple[Task, str | None]]]()
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._open()) as self._client:
            self._stopped = portal.call(Event)
            try:
                while True:
                    free = self.options.concurrency - len(under_way)
                    under_way |= {portal.start_task_soon(self._one, task, save) for task in islice(rest, free)}
                    if not under_way:
                        return
                    finished, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            finally:
                # Answers that are under way are awaited, for they are paid for.
                portal.call(self._stopped.set)
                wait(under_way)

    def _open(self) -> Any:
        base = self.options.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        return self._openai.AsyncOpenAI(
            api_key=self._key, base_url=base, timeout=self.options.timeout, max_retries=0,
            http_client=_http_client(self._stay_there),
        )  # fmt: skip

    @property
    def _where(self) -> str:
        return strike(str(self._client.base_url).rstrip("/"), self._key)

    async def _stay_there(self, request: Any) -> None:
        """Refuse a redirect to another server: it would get all prompts, and its answers would pass as the model's."""
        here, there = self._client.base_url, request.url
        if (there.host, there.port) != (here.host, here.port) or there.scheme not in (here.scheme, "https"):
            target = one_line(strike(f"{there.scheme}://{there.netloc.decode()}", self._key))
            raise EndpointError(f"{self._where}: sends requests on to {target}; name that in --base_url if it is right")

    async def _one(self, task: Task, save: Save) -> tuple[Task, str | None]:
        try:
            answer = await self._ask(task.prompt)
        except BudgetSpent:
            return task, "budget"
        except Refused as refusal:
            self._failures += 1
            if self._failures >= _FAILURES_IN_A_ROW:
                raise EndpointError(
                    f"{_FAILURES_IN_A_ROW} passages in a row got no answer from {self._where}, the last because: "
                    f"{refusal}; see to that and run the same command again, the answers so far are kept"
                ) from refusal
            return task, str(refusal)
        save([(task.key, answer)])
        self._failures = 0
        return task, None

    async def _ask(self, prompt: str) -> Answer:
        reason, pause = "", 0.0
        for repeat in range(self.options.max_retries + 1):
            await self._wait(pause)
            if not self._spend():
                raise BudgetSpent
            self.sent += 1
            self.repeated += repeat > 0
            found = await self._send(prompt)
            if isinstance(found, Answer):
                return found
            reason, retry_after, everyone = found
            pause = _pause(repeat, retry_after, self.options.backoff)
            logger.debug("%s: again in %.1f s", reason, pause)
            if everyone:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        raise Refused(f"{reason} ({self.options.max_retries + 1} times)")

    async def _wait(self, pause: float) -> None:
        """Wait for ``pause`` seconds, and until the endpoint may be asked again. Raises ``BudgetSpent`` at the end."""
        from anyio import move_on_after

        until = time.monotonic() + pause
        while (left := max(until, self._not_before) - time.monotonic()) > 0 and not self._stopped.is_set():
            with move_on_after(left):
                await self._stopped.wait()
        if self._stopped.is_set():
            raise BudgetSpent

    async def _send(self, prompt: str) -> Answer | tuple[str, float | None, bool]:
        """The answer, or what speaks against it: reason, seconds the server asks for, whether all should wait."""
        from anyio import fail_after

        options, openai = self.options, self._openai
        try:
            with fail_after(_WHOLE_ANSWER * options.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self.name, messages=[{"role": "user", "content": prompt}], extra_body=options.body,
                    temperature=self.writing.temperature, max_tokens=self.writing.max_tokens,
                )  # fmt: skip
            answer = parse_answer(response.text)
        except openai.APIStatusError as error:
            return self._refusal(error.response)
        except (TimeoutError, openai.APITimeoutError):
            return f"no answer within --timeout {options.timeout:g} s", None, False
        except (openai.APIConnectionError, OSError, ValueError) as error:
            # Some versions of the client wrap what _stay_there and _http_client raise, others let it through.
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            if isinstance(cause, EndpointError):
                raise cause from None
            what = "malformed answer" if isinstance(cause, ValueError) else f"no connection to {self._where}"
            return self._plain(f"{what}: {cause}"), None, False
        return replace(answer, text=strike(answer.text, self._key))

    def _refusal(self, response: Any) -> tuple[str, float | None, bool]:
        status, text = response.status_code, response.text
        reason = self._plain(f"HTTP {status}: {_message(text)}")
        if any(word in text for word in _SPENT):
            raise EndpointError(f"{self._where}: {reason}; the answers so far are kept")
        if status in _AGAIN or status >= 500:
            retry_after = retry_seconds(response.headers)
            if retry_after is not None and retry_after > self.options.longest_retry_after:
                raise EndpointError(
                    f"{self._where} asks to wait {retry_after:.0f} s ({reason}); run the same command again after "
                    "that, the answers so far are kept"
                )
            return reason, retry_after, status == 429 or retry_after is not None
        if status in (401, 403):
            raise EndpointError(f"{self._where}: {reason}; put a valid key into {self.options.api_key_env}")
        if status == 404:
            raise EndpointError(f"{self._where}: {reason}; check --base_url and --model {self.name}")
        raise Refused(reason)

    def _plain(self, text: str) -> str:
        """One line of at most 300 characters without the key, which is struck out before anything is cut."""
        return one_line(strike(text, self._key))


def _http_client(on_request: Callable[[Any], Awaitable[None]]) -> Any:
    """The client below ``openai``'s: it calls ``on_request`` also before a redirect is followed, and limits bytes."""
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            """The whole response, decompressed. Raises ``ValueError`` for one that is too large."""
            response, raw = await super().send(request, **{**options, "stream": True}), bytearray()
            async with aclosing(response):
                async for piece in response.aiter_bytes():
                    raw += piece
                    if len(raw) > _LARGEST_ANSWER:
                        raise ValueError(f"expected at most {_LARGEST_ANSWER:,} bytes, found more")
            # It is UTF-8 whatever its Content-Type says, and no longer in its Content-Encoding.
            headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            return type(response)(response.status_code, headers=headers, content=bytes(raw), request=response.request)

    return Bounded(event_hooks={"request": [on_request]})


def _read_key(options: EndpointArguments) -> str:
    key = os.environ.get(options.api_key_env, "").strip()
    if key:
        return key
    if options.base_url is None or options.api_key_env != EndpointArguments.api_key_env:
        raise UsageError(
            f"--api_key_env {strike(options.api_key_env)}: no such environment variable; put the key there"
        )
    return "no-key-needed"  # a server of one's own, as vLLM, llama.cpp and Ollama are


def _pause(repeat: int, retry_after: float | None, backoff: float) -> float:
    """Seconds to wait: doubling up to a minute, jittered down to half of it; at least what the server asked for."""
    own: float = min(_LONGEST_WAIT, backoff * 2**repeat) * random.uniform(0.5, 1.0)
    return own if retry_after is None else max(own, retry_after)


def retry_seconds(headers: Mapping[str, str]) -> float | None:
    """What ``retry-after-ms`` or ``Retry-After`` (seconds or a date, RFC 9110) ask for; None for neither."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        with suppress(ValueError):
            return max(0.0, float(value) / unit)
        with suppress(ValueError, OverflowError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def parse_answer(body: str) -> Answer:
    """The answer in a response's body. Raises ``ValueError`` for a body that is not the protocol's."""
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected choices[0].message.content, found {body!r}") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"expected text as content, found {type(text).__name__}")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    # What is no plausible number of tokens is not counted; SQLite would take up to 2^63.
    prompt, completion = (count if isinstance(count, int) and 0 <= count < 2**40 else None for count in counts)
    return Answer(text or "", str(choice.get("finish_reason") or "stop")[:40], prompt, completion)


def _message(text: str) -> str:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text or "no reason given"
    inner = body.get("error", body) if isinstance(body, dict) else body
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
