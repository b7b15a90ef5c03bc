"""The client of OpenAI-style endpoints against a real HTTP server that fails in every way a server can."""

from __future__ import annotations

import email.utils
import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from mining.chat_server import FAILURES, ChatServer, failing, good_query

from FlagEmbedding.mining.query_generation.answer_cache import Answer, AnswerCache, Task
from FlagEmbedding.mining.query_generation.arguments import EndpointArguments, WritingArguments
from FlagEmbedding.mining.query_generation.endpoint import (
    ChatEndpoint,
    EndpointError,
    parse_answer,
    retry_seconds,
)
from FlagEmbedding.mining.query_generation.redaction import strike
from FlagEmbedding.utils.errors import DataError, UsageError

KEY = "sk-very-secret-0123456789"
PASSAGES = [f"passage number {i} tells about river {i} and about its bridges and boats" for i in range(40)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


def tasks(passages: list[str] = PASSAGES) -> list[Task]:
    return [Task(passage, f"Write a query.\n<p>{passage}</p>") for passage in passages]


def ask(server: ChatServer, passages: list[str] = PASSAGES, spend=lambda: True, **changes):
    """What was saved, what went wrong, and the endpoint."""
    writing = {name: changes.pop(name) for name in ("temperature", "max_tokens") if name in changes}
    options = {"model": "m", "base_url": server.base_url, "api_key_env": "TEST_KEY", "backoff": 0.01, **changes}
    endpoint = ChatEndpoint(EndpointArguments(**options), WritingArguments(**writing), spend)
    saved: dict[str, Answer] = {}
    problems = {task.key: why for task, why in endpoint.run(iter(tasks(passages)), saved.update) if why}
    return saved, problems, endpoint


def test_answers_come_back_saved_with_their_usage_and_the_request_is_the_protocols() -> None:
    with ChatServer(key=KEY) as server:
        saved, problems, endpoint = ask(
            server, temperature=0.3, max_tokens=99, request_options='{"reasoning_effort": "low"}'
        )
    assert not problems
    assert saved == {p: Answer(good_query(p), "stop", 10, 5) for p in PASSAGES}
    assert (endpoint.sent, endpoint.repeated) == (40, 0)
    body = server.requests[0]["body"]
    assert body == {
        "model": "m", "temperature": 0.3, "max_tokens": 99, "reasoning_effort": "low",
        "messages": [{"role": "user", "content": f"Write a query.\n<p>{server.requests[0]['passage']}</p>"}],
    }  # fmt: skip


def test_with_half_of_all_requests_failing_every_passage_is_answered() -> None:
    with ChatServer(failing(0.5)) as server:
        saved, problems, endpoint = ask(server, max_retries=30)
    assert not problems
    assert {key: answer.text for key, answer in saved.items()} == {p: good_query(p) for p in PASSAGES}
    failed = sum(request["kind"] != "good" for request in server.requests)
    assert failed >= 20 and {r["kind"] for r in server.requests} >= set(FAILURES)
    assert endpoint.sent == len(server.requests) == 40 + failed
    assert endpoint.repeated == failed


@pytest.mark.parametrize("kind", [*FAILURES, "408"])
def test_every_transient_failure_is_repeated_and_then_passed_over(kind: str) -> None:
    with ChatServer(lambda passage, nth: kind if passage == PASSAGES[1] else "good") as server:
        saved, problems, _ = ask(server, PASSAGES[:3], max_retries=2)
    assert set(saved) == {PASSAGES[0], PASSAGES[2]}
    assert list(problems) == [PASSAGES[1]] and "(3 times)" in problems[PASSAGES[1]]
    assert server.counts == {PASSAGES[0]: 1, PASSAGES[1]: 3, PASSAGES[2]: 1}


def test_a_refusal_of_one_passage_is_not_repeated() -> None:
    with ChatServer(lambda passage, nth: "400" if passage == PASSAGES[1] else "good") as server:
        saved, problems, _ = ask(server, PASSAGES[:3])
    assert set(saved) == {PASSAGES[0], PASSAGES[2]}
    assert problems == {PASSAGES[1]: "HTTP 400: status 400"}
    assert server.counts[PASSAGES[1]] == 1


def test_a_slow_answer_times_out_and_is_asked_for_again() -> None:
    with ChatServer(lambda passage, nth: "slow" if nth == 0 else "good") as server:
        started = time.monotonic()
        saved, problems, _ = ask(server, PASSAGES[:4], timeout=0.3)
        assert time.monotonic() - started < 1.4
    assert len(saved) == 4 and not problems
    assert set(server.counts.values()) == {2}


def test_requests_run_together_but_no_more_than_asked() -> None:
    with ChatServer(delay=0.2) as server:
        started = time.monotonic()
        ask(server, concurrency=8)
        took = time.monotonic() - started
    assert 4 <= server.most_under_way <= 8
    assert took < 40 * 0.2 / 2


def test_retry_after_holds_back_every_thread() -> None:
    with ChatServer(lambda passage, nth: "429:1" if passage == PASSAGES[0] and nth == 0 else "good") as server:
        saved, _, _ = ask(server, concurrency=2)
    assert len(saved) == 40
    limited = next(r["time"] for r in server.requests if r["kind"].startswith("429"))
    assert not [r for r in server.requests if limited + 0.3 < r["time"] < limited + 0.95]
    assert sum(r["time"] > limited + 0.95 for r in server.requests) > 20


def test_retry_after_in_its_forms() -> None:
    assert retry_seconds({"retry-after": "7"}) == 7
    assert retry_seconds({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert retry_seconds({}) is None and retry_seconds({"retry-after": "soon"}) is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= (retry_seconds({"retry-after": date}) or 0) <= 31
    assert retry_seconds({"retry-after": email.utils.formatdate(0, usegmt=True)}) == 0


def test_a_wait_too_long_for_anyone_ends_the_run() -> None:
    with (
        ChatServer(lambda passage, nth: "429:3600") as server,
        pytest.raises(EndpointError, match="asks to wait 3600 s"),
    ):
        ask(server)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("quota", "no money left"), ("404", "check --base_url and --model m"), ("403", "put a valid key into TEST_KEY")],
)
def test_what_no_passage_would_survive_ends_the_run_at_once(kind: str, message: str) -> None:
    with ChatServer(lambda passage, nth: kind) as server, pytest.raises(EndpointError, match=message):
        ask(server, concurrency=2)
    assert len(server.requests) <= 4


def test_the_key_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="FlagEmbedding")
    with ChatServer(key="another") as server, pytest.raises(EndpointError) as error:
        ask(server)
    assert "Incorrect API key provided: ***" in str(error.value)
    assert KEY not in str(error.value) and KEY not in caplog.text


def test_an_endpoint_that_is_not_there_ends_the_run(tmp_path: Path) -> None:
    with ChatServer() as server:
        pass
    with pytest.raises(EndpointError, match=r"10 passages in a row got no answer .* no connection"):
        ask(server, max_retries=1)


def test_failures_in_a_row_are_those_without_an_answer_between() -> None:
    """Sixteen of forty passages get no answer, never ten in a row."""
    failing_ones = {passage for i, passage in enumerate(PASSAGES) if i % 5 in (1, 2)}
    with ChatServer(lambda passage, nth: "400" if passage in failing_ones else "good") as server:
        saved, problems, _ = ask(server, concurrency=1)
    assert len(saved) == 24 and set(problems) == failing_ones


def test_a_repeat_waits_twice_as_long_as_the_one_before() -> None:
    """Between half of 0.2, 0.4, 0.8 seconds and the whole of it, and what the request itself takes."""
    with ChatServer(lambda passage, nth: "500" if nth < 3 else "good") as server:
        ask(server, PASSAGES[:1], backoff=0.2)
    times = [request["time"] for request in server.requests]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True))


def test_a_missing_key_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UsageError, match="--api_key_env TEST_KEY: no such environment variable"):
        ChatEndpoint(EndpointArguments("m", "http://127.0.0.1:9/v1", "TEST_KEY"), WritingArguments(), lambda: True)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        ChatEndpoint(EndpointArguments("m"), WritingArguments(), lambda: True)
    ChatEndpoint(
        EndpointArguments("m", "http://127.0.0.1:9/v1"), WritingArguments(), lambda: True
    )  # a server of one's own needs none


@pytest.mark.parametrize("limit", [0, 7, 39])
def test_the_budget_is_never_passed(tmp_path: Path, limit: int) -> None:
    cache = AnswerCache(tmp_path / "cache")
    with ChatServer(failing(0.3)) as server:
        saved, problems, _ = ask(server, spend=lambda: cache.spend("job", limit), max_retries=20)
    assert len(server.requests) == limit == cache.spent("job")
    assert set(problems.values()) == {"budget"} and len(saved) + len(problems) == 40


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "null", '{"choices": []}', '{"choices": [{}]}', '{"choices": [{"message": null}]}',
     '{"choices": [{"message": {"content": 3}}]}', '{"error": "x"}'],
)  # fmt: skip
def test_bodies_that_are_not_the_protocols(body: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_answer(body)


def test_a_null_answer_is_an_empty_one() -> None:
    body = '{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}], "usage": null}'
    assert parse_answer(body) == Answer("", "content_filter")


# ---- what is broken or hostile ----


def one_failing(kind: str, **changes) -> tuple[str, ChatServer]:
    """What is said of the passage that gets such a response, beside two that are answered; no second try."""
    with ChatServer(lambda passage, nth: kind if passage == PASSAGES[1] else "good") as server:
        saved, problems, _ = ask(server, PASSAGES[:3], max_retries=0, **changes)
    assert set(saved) == {PASSAGES[0], PASSAGES[2]} and list(problems) == [PASSAGES[1]]
    return problems[PASSAGES[1]], server


def test_an_answer_without_end_is_broken_off_after_a_mebibyte() -> None:
    problem, server = one_failing("endless")
    assert "expected at most 1,048,576 bytes" in problem
    assert server.written < 1 << 25


def test_one_byte_at_a_time_does_not_hold_a_request_for_ever() -> None:
    """Every byte comes within --timeout, which a deadline for the whole answer goes beside."""
    started = time.monotonic()
    problem, _ = one_failing("drip", timeout=0.3)
    assert "no answer within --timeout 0.3 s" in problem
    assert 1.2 < time.monotonic() - started < 10


def test_a_redirect_to_another_server_is_refused_and_one_within_it_followed() -> None:
    with ChatServer() as other, ChatServer(lambda passage, nth: f"to:{other.base_url}/chat/completions") as server:
        with pytest.raises(
            EndpointError, match=rf"sends requests on to {other.base_url[:-3]}; name that in --base_url"
        ):
            ask(server)
        assert not other.requests
        with ChatServer(lambda passage, nth: "good" if nth else "to:/v1/chat/completions") as server:
            saved, problems, _ = ask(server)
        assert len(saved) == 40 and not problems


@pytest.mark.parametrize(
    "body",
    [f"x{{'key': '{KEY}'", "y" * 60 + KEY, "[" * 100_000, '{"choices": [{"message": {"content": ' + f'["{KEY}"]}}}}]}}',
     "\x1b[31mAuthorization: Bearer abcdef0123456", "https://me:hunter22@host/", '"api_key": "abcdef0123456"'],
)  # fmt: skip
def test_a_malformed_answer_gives_no_key_and_no_escape_away(body: str) -> None:
    problem, _ = one_failing(f"body:{body}")
    assert problem.startswith("malformed answer: expected") and len(problem) < 330
    assert not [secret for secret in (KEY[:8], "abcdef", "hunter", "\x1b") if secret in problem]


def test_no_beginning_of_the_key_is_left_where_a_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Malformed answers with a key of no usual shape at every eighth place, each other one answered."""
    monkeypatch.setenv("TEST_KEY", "Zebra-of-our-own-0123456789")
    bodies = {passage: "y" * 8 * i + "Zebra-of-our-own-0123456789" for i, passage in enumerate(PASSAGES)}
    order = [text for passage in PASSAGES for text in (passage, f"{passage} too")]
    with ChatServer(lambda passage, nth: f"body:{bodies[passage]}" if passage in bodies else "good") as server:
        _, problems, _ = ask(server, order, max_retries=0, concurrency=1)
    assert len(problems) == 40 and not [problem for problem in problems.values() if "Zebra" in problem]


def test_an_answer_that_repeats_the_key_is_kept_without_it() -> None:
    answers = {PASSAGES[0]: f"what is {KEY}?", PASSAGES[1]: "is sk-abcdefghijklmnop0123 a key?", PASSAGES[2]: "fine?"}
    with ChatServer(answer=lambda passage, nth: answers[passage]) as server:
        saved, _, _ = ask(server, PASSAGES[:3])
    assert [saved[p].text for p in PASSAGES[:3]] == ["what is ***?", "is *** a key?", "fine?"]


@pytest.mark.parametrize(
    "secret",
    ["http://me:p@ss-hunter@host/v1", "AKIAABCDEFGHIJKLMNOP", "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
     "x?sig=hunter-0123", "glpat-hunter01234567890", "xoxb-hunter0123456789",
     "github_pat_hunter01234567890", "pplx-hunter0123456789"],
)  # fmt: skip
def test_keys_are_known_by_their_shape(secret: str) -> None:
    struck = strike(f"it says {secret} there")
    assert "***" in struck and struck.startswith("it says ") and struck.endswith(" there")
    assert not [part for part in ("hunter", "p@ss", "ABCDEF", "hbGci", "c2ln") if part in struck]


def test_flags_never_print_what_may_be_a_key() -> None:
    for flag, secret in (("api_key_env", "Zebra-of-our-own"), ("base_url", "me:hunter22@host/v1")):
        with pytest.raises(UsageError, match=f"--{flag}: expected") as caught:
            EndpointArguments(model="m", **{flag: secret})
        assert "Zebra" not in str(caught.value) and "hunter" not in str(caught.value)


def test_a_word_that_serves_as_key_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "ollama")
    with ChatServer(answer=lambda passage, nth: "what is ollama?") as server:
        saved, _, _ = ask(server, PASSAGES[:1])
    assert saved[PASSAGES[0]].text == "what is ollama?"


def test_odd_counts_and_characters_are_stored(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10**30, "completion_tokens": -1}
    choice = {"message": {"content": "a\x00b\ud800\x1b[2J"}, "finish_reason": "\udfff" * 99}
    answer = parse_answer(json.dumps({"choices": [choice], "usage": usage}))
    assert (answer.prompt_tokens, answer.completion_tokens, len(answer.finish)) == (None, None, 40)
    cache = AnswerCache(tmp_path / "cache")
    cache.put([("k", answer)])
    found = cache.get("k")
    assert found is not None and found.text == "a\x00b?\x1b[2J" and found.finish == "?" * 40


def test_a_packed_answer_is_unpacked_and_read_as_utf8() -> None:
    with ChatServer(lambda passage, nth: "coded", answer=lambda passage, nth: "강은 어디로 흐르나?") as server:
        saved, problems, _ = ask(server, PASSAGES[:2])
    assert not problems and {answer.text for answer in saved.values()} == {"강은 어디로 흐르나?"}


def test_environment_of_the_official_client(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_ORG_ID", "our-organization")
        saved, _, _ = ask(server, PASSAGES[:1], base_url=None)
        assert len(saved) == 1 and server.requests[0]["headers"]["OpenAI-Organization"] == "our-organization"


# ---- the cache ----


def test_the_cache_keeps_the_first_answer_and_survives_reopening(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache")
    cache.put([("k", Answer("one", "stop", 3, 4)), ("half", Answer("a\ud83d", "length"))])
    cache.put([("k", Answer("two"))])
    cache.put_ranks([("r", 3)])
    assert cache.spend("j", 2) and cache.spend("j", 2) and not cache.spend("j", 2) and cache.spend("j", None)
    cache.close()
    again = AnswerCache(tmp_path / "cache")
    assert again.get("k") == Answer("one", "stop", 3, 4)
    assert again.get("half") == Answer("a?", "length") and again.get("none") is None
    assert (again.rank("r"), again.rank("s"), again.spent("j")) == (3, None, 3)
    again.settle("j")
    assert again.spent("j") == 0


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("my notes, which are long enough to be no database at all\n" * 20)
    with pytest.raises(DataError, match="name another --cache"):
        AnswerCache(tmp_path / "cache")
