"""neg_q from end to end: real queries first, a real HTTP server for the rest, checks, caps, kill -9."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mining.chat_server import ChatServer, failing, good_query
from mining.query_runs import PROMPT, endpoint, expected, read, report, run

from FlagEmbedding.finetune.check_data import CheckArguments, check
from FlagEmbedding.mining.query_generation.pipeline import estimated_tokens
from FlagEmbedding.mining.query_generation.report import markdown

# ---- reuse ----


def test_real_queries_are_reused_exactly(rows: list[dict], tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    owner = {row["pos"][0]: row["query"] for row in rows}
    out = read(tmp_path / "out.jsonl")
    assert out == [{**row, "neg_q": [owner.get(text, "") for text in row["neg"]]} for row in rows]
    assert list(out[0]) == ["query", "pos", "neg", "neg_q", "pos_scores", "extra"]
    assert report(tmp_path)["negatives"] == {"reused": 60, "none": 40}
    assert report(tmp_path)["different"] == {"reused": 20, "none": 40}
    assert check(CheckArguments([str(tmp_path)])), "training would read it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "reports"]


def test_several_queries_a_false_negative_and_what_was_there(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "pos": ["P"], "neg": ["Q", "R", "S"], "neg_q": ["", "mine", ["x", "y"]]},
        {"query": "b", "pos": ["Q"], "neg": ["P", " p "]},
        {"query": "c", "pos": ["Q", "P"], "neg": "T"},
        {"query": "a", "pos": ["T"], "neg": ["P"]},  # P answers "a": no query of its own is given to it here
    ]
    more = [{"query": "d", "pos": ["T"], "neg": ["-"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "more.txt.jsonl").write_text(json.dumps(more[0]) + "\n")
    assert run(tmp_path, "--queries_per_negative", 2, "--reuse_from", tmp_path / "more.txt.jsonl") == 0
    found = [row["neg_q"] for row in read(tmp_path / "out.jsonl")]
    assert found[0][1:] == ["mine", ["x", "y"]] and sorted(found[0][0]) == ["b", "c"]
    assert sorted(found[1][0]) == ["a", "c"] == sorted(found[1][1])  # the same text in another spelling
    assert sorted(found[2][0]) == ["a", "d"] and found[3] == [""]
    assert report(tmp_path)["negatives"] == {"kept": 2, "reused": 4, "own_query": 1}
    assert run(tmp_path, "--replace", "--overwrite") == 0
    assert read(tmp_path / "out.jsonl")[0]["neg_q"][1:] == ["", ""]


def test_the_choice_among_real_queries_is_the_seeds_and_no_matter_of_order(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "pos": ["P"], "neg": ["N"]} for i in range(9)] + [
        {"query": "z", "pos": ["Z"], "neg": ["P"]}
    ]
    chosen = {}
    for seed in (1, 2, 3, 4):
        for order in (rows, rows[::-1]):
            (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
            assert run(tmp_path, "--seed", seed, "--overwrite") == 0
            chosen.setdefault(seed, set()).add(
                next(r for r in read(tmp_path / "out.jsonl") if r["query"] == "z")["neg_q"][0]
            )
    assert all(len(found) == 1 for found in chosen.values())
    assert len(set.union(*chosen.values())) > 1


# ---- an endpoint ----


def test_twenty_percent_failures_and_every_negative_gets_its_query(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer(failing(0.2)) as server:
        assert run(tmp_path, *endpoint(server)) == 0
        assert read(tmp_path / "out.jsonl") == expected(rows)
        assert len(server.requests) > 40 == len(server.counts)
        found = report(tmp_path)
        assert found["negatives"] == {"reused": 60, "generated": 40}
        assert found["model"]["requests"] == len(server.requests)
        assert found["model"]["prompt_tokens"] == 400 and found["left"] == 0
        # Once more, and into another file: nothing is paid for twice.
        before = len(server.requests)
        assert run(tmp_path, *endpoint(server, "--overwrite")) == 0
        assert run(tmp_path, *endpoint(server), name="other.jsonl") == 0
        assert len(server.requests) == before
    assert (tmp_path / "other.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert not (tmp_path / "reports/out.neg_q.rejected.jsonl").exists()


def test_kill_9_and_the_same_command_ends_with_the_same_file_and_pays_once(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer(failing(0.2), delay=0.03) as server:
        words = [str(w) for w in endpoint(server, "--concurrency", 2)]
        command = [sys.executable, "-m", "FlagEmbedding.mining.query_generation", "--input_file", tmp_path / "in.jsonl"]
        command += ["--output_file", tmp_path / "out.jsonl", *words]
        answered: set[str] = set()
        for wanted in (8, 20):
            worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            while len(server.requests) < wanted and worker.poll() is None:
                time.sleep(0.005)
            worker.send_signal(signal.SIGKILL)
            assert worker.wait() == -signal.SIGKILL
            assert not (tmp_path / "out.jsonl").exists()
            with sqlite3.connect(tmp_path / ".neg_q_cache.sqlite") as db:
                answered = {text for (text,) in db.execute("SELECT text FROM answers")}
        assert 8 <= len(answered) < 40
        time.sleep(0.1)  # what was under way is noted as a request
        first = len(server.requests)
        assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
        later = {request["passage"] for request in server.requests[first:]}
    assert read(tmp_path / "out.jsonl") == expected(rows)
    assert not {good_query(passage) for passage in later} & answered
    # Each kill may lose the answers that were on their way, two here; no other passage was answered twice.
    good = [request["passage"] for request in server.requests if request["kind"] == "good"]
    assert len(good) - len(set(good)) <= 2 * 2
    assert report(tmp_path)["model"]["requests"] == len(server.requests)  # the count survived the kills
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_rejected_answers_are_asked_for_again_and_then_listed(
    rows: list[dict], texts: list[str], tmp_path: Path
) -> None:
    stubborn, slow_to_learn = texts[20], texts[21]

    def answer(passage: str, nth: int) -> str:
        if passage == stubborn or (passage == slow_to_learn and nth < 2):
            return ["What is this about?", passage[:60], "یک\nدو"][nth % 3]
        return good_query(passage)

    with ChatServer(answer=answer) as server:
        assert run(tmp_path, *endpoint(server, "--attempts", 3)) == 0
    assert server.counts[stubborn] == 3 == server.counts[slow_to_learn]
    assert sum(server.counts.values()) == 44
    out = {text: q for row in read(tmp_path / "out.jsonl") for text, q in zip(row["neg"], row["neg_q"], strict=True)}
    assert out[stubborn] == "" and out[slow_to_learn] == good_query(slow_to_learn)
    assert read(tmp_path / "reports/out.neg_q.rejected.jsonl") == [
        {
            "passage": stubborn,
            "tried": [
                {"attempt": 1, "query": "What is this about?", "reason": "other_script"},
                {"attempt": 2, "query": stubborn[:60].strip(), "reason": "copy"},
                {"attempt": 3, "query": "یک\nدو", "reason": "several_lines"},
            ],
        }
    ]
    found = report(tmp_path)
    assert found["rejected"] == [[0, "other_script", 2], [1, "copy", 2], [2, "several_lines", 1]]
    assert found["negatives"]["none"] == 1 == found["left"]


def test_dry_run_says_what_it_comes_to_and_asks_nothing(
    rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer() as server:
        assert run(tmp_path, *endpoint(server, "--dry_run", "--max_requests", 30)) == 0
        page = capsys.readouterr().out
        assert "requests: 40 in the first round" in page and "--max_requests 30: 0 are sent already" in page
        assert not server.requests and not (tmp_path / "out.jsonl").exists()
        # The cap holds; the file is written with what there is; the same again goes on from there.
        assert run(tmp_path, *endpoint(server, "--max_requests", 30)) == 0
        assert len(server.requests) == 30 and report(tmp_path)["negatives"]["generated"] == 30
        assert "10 passages were not asked about" in capsys.readouterr().out
        assert run(tmp_path, *endpoint(server, "--dry_run")) == 0
        assert "requests: 10 in the first round" in capsys.readouterr().out
        assert run(tmp_path, *endpoint(server, "--max_requests", 30, "--overwrite")) == 0
        assert len(server.requests) == 40
    assert read(tmp_path / "out.jsonl") == expected(rows)


def test_an_endpoint_that_gives_up_is_one_line_and_leaves_no_file(rows, tmp_path: Path, capsys) -> None:
    with ChatServer(lambda passage, nth: "good" if nth == 0 and hash(passage) % 2 else "401") as server:
        assert run(tmp_path, *endpoint(server)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: http://127.0.0.1") and "OPENAI_API_KEY" in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--local_model", "x"], "give one of them"),
        (["--base_url", "http://x"], "no effect without --model"),
        (["--model", "m", "--base_url", "localhost:8000"], "expected http://"),
        (["--dry_run"], "no effect without"),
        (["--model", "m", "--encoder", "e"], "needs both"),
        (["--model", "m", "--round_trip_top_k", "3"], "needs both"),
        (["--attempts", "0"], "--attempts must be at least 1"),
        (["--model", "m", "--api_key_env", "NOT_THERE"], "no such environment variable"),
        (["--model", "m", "--base_url", "http://x", "--prompt", "nowhere"], "no such file or folder"),
        (["--local_model", "/nowhere"], "--local_model|nowhere"),
        (["--modell", "m"], "unrecognized"),
    ],
)
def test_wrong_options_are_one_line(rows, tmp_path: Path, capsys, words: list[str], message: str) -> None:
    assert run(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert [word for word in message.split("|") if word in error] and error.count("error:") == 1


def test_replace_asks_for_what_was_there(tmp_path: Path) -> None:
    row = {"query": "a", "pos": ["P"], "neg": ["the river runs to the sea by the old town"], "neg_q": ["mine"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    with ChatServer() as server:
        assert run(tmp_path, *endpoint(server)) == 0 and not server.requests
        assert run(tmp_path, *endpoint(server, "--replace", "--overwrite")) == 0 and len(server.requests) == 1
    assert read(tmp_path / "out.jsonl")[0]["neg_q"] == [good_query(row["neg"][0])]


def test_another_model_or_prompt_is_asked_again(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer() as server:
        for number, words in enumerate(([], ["--model", "other"], ["--prompt", f"Now {PROMPT}"], ["--max_tokens", 9])):
            assert run(tmp_path, *endpoint(server), *words, name=f"{number}.jsonl") == 0
            assert len(server.requests) == 40 * min(number + 1, 3)  # sampling options are not part of the question


def test_the_budget_is_the_jobs(rows: list[dict], tmp_path: Path) -> None:
    """What a run that ended early has sent counts for the same output alone, and no longer once it is finished."""
    down = {"since": 3}
    with ChatServer(lambda passage, nth: "401" if len(server.requests) >= down["since"] else "good") as server:
        words = endpoint(server, "--max_requests", 10, "--concurrency", 1)
        assert run(tmp_path, *words) == 2 and len(server.requests) == 4
        down["since"] = 10**6
        assert run(tmp_path, *words, name="other.jsonl") == 0 and len(server.requests) == 4 + 10
        assert run(tmp_path, *words) == 0 and len(server.requests) == 14 + 6
        assert run(tmp_path, *words, "--overwrite") == 0 and len(server.requests) == 20 + 10


def test_temperature_0_asks_once(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer(answer=lambda passage, nth: "no") as server:
        assert run(tmp_path, *endpoint(server, "--temperature", 0)) == 0
        assert len(server.requests) == 40 and report(tmp_path)["rejected"] == [[0, "too_short", 40]]


def test_language_and_cache_are_the_flags(rows: list[dict], tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/ko.txt").write_text("Korean: <p>{passage}</p>")
    words = ["--prompt", tmp_path / "prompts", "--language", "ko", "--cache", tmp_path / "here.sqlite"]
    with ChatServer() as server:
        assert run(tmp_path, *endpoint(server), *words) == 0
        assert {request["body"]["messages"][0]["content"][:11] for request in server.requests} == {"Korean: <p>"}
        assert (tmp_path / "here.sqlite").exists() and not (tmp_path / ".neg_q_cache.sqlite").exists()
        before = (tmp_path / "out.jsonl").read_bytes()
        assert run(tmp_path, *endpoint(server), *words) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "out.jsonl").read_bytes() == before


def test_tokens_by_rule_of_thumb() -> None:
    assert [estimated_tokens(text) for text in ("abcdefgh", "한국어로", "ab한국", "")] == [2, 2, 2, 0]


def test_the_page_adds_up() -> None:
    record = {
        "output": "o", "rows": 5, "model": None, "negatives": {"kept": 1, "generated": 2, "own_query": 3, "none": 4},
        "different": {"kept": 1, "generated": 1, "own_query": 1, "none": 1}, "rejected": [], "left": 0,
    }  # fmt: skip
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in markdown(record).splitlines() if line.startswith("|")}  # fmt: skip
    assert cells["**covered**"] == ["3", "30.00 %", "2", "50.00 %"]
    assert cells["none: answers its own row's query (a false negative)"] == ["3", "30.00 %", "1", "25.00 %"]
    names = ("requests", "repeats_of_this_run", "answers", "prompt_tokens", "completion_tokens", "not_asked")
    model = {**dict.fromkeys(names, 0), "name": "m", "where": "w", "round_trip": None}
    page = markdown({**record, "model": model, "rejected": [[0, "copy", 7], [2, "copy", 9], [2, "empty", 1]]})
    table = [[cell.strip() for cell in line.split("|")[1:-2]] for line in page.splitlines() if line.startswith("| ")]
    assert ["copy", "7", "0", "9"] in table and ["empty", "0", "0", "1"] in table


def test_defaults(rows: list[dict], tmp_path: Path) -> None:
    """What a command line that says nothing asks for."""
    with ChatServer(answer=lambda passage, nth: "x" if nth < 2 else good_query(passage)) as server:
        assert run(tmp_path, *endpoint(server)) == 0
        body = server.requests[0]["body"]
        assert (body["temperature"], body["max_tokens"], sorted(body)) == (
            0.7, 256, ["max_tokens", "messages", "model", "temperature"],
        )  # fmt: skip
        assert set(server.counts.values()) == {3} and report(tmp_path)["negatives"]["generated"] == 40
