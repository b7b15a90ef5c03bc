"""neg_q from end to end: real queries first, a real HTTP server for the rest, checks, caps, kill -9, a local model."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from mining.chat_server import ChatServer, failing, good_query
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from FlagEmbedding import FlagModel
from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.finetune.check_data import CheckArguments, check
from FlagEmbedding.mining.query_generation.command import main

PROMPT = "Ask about: <p>{passage}</p>"


@pytest.fixture(scope="module")
def texts(sample_dir: Path) -> list[str]:
    return [p.text for p in read_file(sample_dir / "miracl-corpus-v1.0-fa/docs-0.jsonl.gz")]


@pytest.fixture
def rows(texts: list[str], tmp_path: Path) -> list[dict]:
    """20 queries on passages 0 to 19; negatives are three of those and two of passages 20 to 59, nobody's positives."""
    rows = []
    for i in range(20):
        negatives = [texts[(i + step) % 20] for step in (1, 5, 7)] + [texts[20 + 2 * i], texts[20 + (2 * i + 1) % 40]]
        rows.append({"query": f"پرسش شماره {i}", "pos": [texts[i]], "neg": negatives, "pos_scores": [1.0], "extra": i})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def run(folder: Path, *words: object, name: str = "out.jsonl") -> int:
    return main(["--input_file", str(folder / "in.jsonl"), "--output_file", str(folder / name), *map(str, words)])


def endpoint(server: ChatServer, *words: object) -> list[object]:
    return ["--model", "m", "--base_url", server.base_url, "--prompt", PROMPT, "--backoff", 0.01, *words]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def report(folder: Path, name: str = "out") -> dict:
    return json.loads((folder / f"reports/{name}.neg_q.json").read_text())


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


def expected(rows: list[dict]) -> list[dict]:
    owner = {row["pos"][0]: row["query"] for row in rows}
    return [{**row, "neg_q": [owner.get(text) or good_query(text) for text in row["neg"]]} for row in rows]


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
        (["--dry_run"], "no effect without"),
        (["--model", "m", "--encoder", "e"], "needs both"),
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


# ---- the round trip ----


def test_the_round_trip_agrees_with_ranks_computed_by_hand(
    rows: list[dict], texts: list[str], tmp_path: Path, tiny_model_dir: Path
) -> None:
    waiting = texts[20:60]
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text != texts[20])
    )
    model = FlagModel(str(tiny_model_dir))
    corpus = [text for text in texts if text != texts[20]]
    scores = (
        np.asarray(model.encode_queries([good_query(p) for p in waiting])) @ np.asarray(model.encode_corpus(corpus)).T
    )
    ranks = [
        int((row > row[corpus.index(p)]).sum()) + 1 if p in corpus else 0
        for p, row in zip(waiting, scores, strict=True)
    ]
    k = sorted(ranks)[20]
    with ChatServer() as server:
        words = [
            "--encoder",
            tiny_model_dir,
            "--round_trip_top_k",
            k,
            "--corpus",
            tmp_path / "corpus.jsonl",
            "--attempts",
            1,
        ]
        assert run(tmp_path, *endpoint(server, *words, "--index_dir", tmp_path / "index")) == 0
    out = {text: q for row in read(tmp_path / "out.jsonl") for text, q in zip(row["neg"], row["neg_q"], strict=True)}
    assert [bool(out[p]) for p in waiting] == [rank <= k for rank in ranks]
    assert 10 < sum(rank <= k for rank in ranks) < 40
    assert report(tmp_path)["model"]["round_trip_unjudged"] == 1  # the passage that the corpus lacks
    listed = read(tmp_path / "reports/out.neg_q.rejected.jsonl")
    assert {entry["passage"] for entry in listed} == {p for p, rank in zip(waiting, ranks, strict=True) if rank > k}
    assert {tried["reason"] for entry in listed for tried in entry["tried"]} == {"not_retrieved"}


# ---- a model on this machine ----


@pytest.mark.parametrize("kind", ["seq2seq", "causal", "chat"])
def test_a_local_model_writes_the_same_queries_again(kind: str, rows: list[dict], tmp_path: Path) -> None:
    """Random weights write nothing useful; they show that both kinds load, sample, stop, repeat, and are checked."""
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "seq2seq":
        config = T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=tokenizer.pad_token_id, **special,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id, **special,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if kind == "chat":
            tokenizer.chat_template = "{% for m in messages %}user: {{ m.content }}\n{% endfor %}assistant:"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--local_model", tmp_path / "model", "--max_tokens", 8, "--attempts", 2, "--language", "fa"]
    assert run(tmp_path, *words) == 0
    assert run(tmp_path, *words, "--cache", tmp_path / "fresh.sqlite", name="other.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    caches = [sqlite3.connect(tmp_path / name) for name in (".neg_q_cache.sqlite", "fresh.sqlite")]
    answers = [dict(db.execute("SELECT key, text FROM answers")) for db in caches]
    found = report(tmp_path)
    assert answers[0] == answers[1] and len(answers[0]) == found["model"]["requests"] > 70
    assert len(set(answers[0].values())) > 40  # attempts and passages differ
    assert sum(count for _, _, count in found["rejected"]) + found["different"].get("generated", 0) == len(answers[0])
