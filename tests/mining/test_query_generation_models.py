"""neg_q from end to end: useless and hostile answers, the round trip, a model on this machine."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from mining.chat_server import ChatServer, good_query
from mining.query_runs import PROMPT, endpoint, read, report, run
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from FlagEmbedding import FlagModel
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.mining.query_generation.answer_cache import Answer, Task
from FlagEmbedding.mining.query_generation.arguments import LocalModelArguments, WritingArguments
from FlagEmbedding.mining.query_generation.local_model import LocalModel

# ---- what is hostile or useless ----


def test_one_sentence_for_every_passage_and_the_rows_own_queries_cover_nothing(
    rows: list[dict], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, own, own_of = "این متن درباره چیست", "پرسش  شماره 3؟", texts[21]  # another spelling of a row's query

    def answer(passage: str, nth: int) -> str:
        if passage == own_of:
            return own
        return good_query(passage) if passage == texts[22] else same + "?؟! "[texts.index(passage) % 4]

    with ChatServer(answer=answer) as server:
        assert run(tmp_path, *endpoint(server, "--attempts", 2)) == 0
    found = report(tmp_path)
    assert found["different"] == {"reused": 20, "generated": 1, "none": 39}
    assert found["rejected"] == [[0, "repeated", 39], [1, "repeated", 39]]
    assert "| **covered**" in (page := capsys.readouterr().out) and "61 " in page
    listed = {
        entry["passage"]: entry["tried"][0]["query"] for entry in read(tmp_path / "reports/out.neg_q.rejected.jsonl")
    }
    assert listed[own_of] == own and len(listed) == 39


def test_the_words_of_the_prompt_are_no_query(texts: list[str], rows: list[dict], tmp_path: Path) -> None:
    words = "یک پرسش بنویس که این متن پاسخ آن است"

    def answer(passage: str, nth: int) -> str:
        return f"{words}:" if passage == texts[20] else good_query(passage)

    with ChatServer(answer=answer) as server:
        asked = ["--model", "m", "--base_url", server.base_url, "--prompt", words + " <p>{passage}</p>"]
        assert run(tmp_path, *asked, "--attempts", 1) == 0
    assert report(tmp_path)["rejected"] == [[0, "echo", 1]]


def test_an_early_query_that_comes_again_for_another_passage_is_rejected(
    rows: list[dict], texts: list[str], tmp_path: Path
) -> None:
    first, later = texts[20], texts[21]
    answers = {first: [good_query(first)], later: ["What?", good_query(first), good_query(later)]}
    with ChatServer(answer=lambda passage, nth: answers.get(passage, [good_query(passage)])[nth]) as server:
        assert run(tmp_path, *endpoint(server)) == 0
    out = {text: q for row in read(tmp_path / "out.jsonl") for text, q in zip(row["neg"], row["neg_q"], strict=True)}
    assert (out[first], out[later]) == (good_query(first), good_query(later))
    assert report(tmp_path)["rejected"] == [[0, "other_script", 1], [1, "repeated", 1]]


def test_a_key_and_a_password_reach_no_file_and_no_terminal(
    rows: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, password, token = "my-own-key-0123456789", "hunter22", "abcdef-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    kinds = {0: f"body:{'x' * 70}{key}", 1: "good"}
    with ChatServer(
        lambda passage, nth: kinds[min(1, len(passage) % 4)], answer=lambda passage, nth: f"{good_query(passage)} {key}"
    ) as server:
        url = server.base_url.replace("://", f"://me:{password}@")
        words = [*endpoint(server, "--max_retries", 0, "--concurrency", 1, "--attempts", 2), "--base_url", url]
        words += ["--request_options", json.dumps({"api_key": token})]
        monkeypatch.setattr(sys, "argv", ["query_generation", *map(str, words)])
        assert run(tmp_path, *words) == 0
        with monkeypatch.context() as patch:
            patch.setitem(kinds, 0, "401")
            assert run(tmp_path, *words, "--cache", tmp_path / "fresh.sqlite", name="other.jsonl") == 2
    shown = "".join(capsys.readouterr())
    wrong = [str(path) for path in tmp_path.rglob("*") if path.is_file()
             for secret in (key[:12], password, token[:8]) if secret.encode() in path.read_bytes()]  # fmt: skip
    assert not wrong and not [secret for secret in (key[:12], password, token[:8]) if secret in shown]
    arguments = report(tmp_path)["arguments"]["endpoint"]
    assert arguments["base_url"] == server.base_url.replace("://", "://***@")
    assert "http://***@127" in (tmp_path / "reports/out.neg_q.md").read_text()


def test_a_huge_answer_is_kept_once_and_listed_short(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer(answer=lambda passage, nth: "ب" * 100_000 + "\x9b31m\x1b[31m") as server:
        assert run(tmp_path, *endpoint(server, "--attempts", 1)) == 0
    listed = read(tmp_path / "reports/out.neg_q.rejected.jsonl")
    assert len(listed) == 40 and max(len(entry["tried"][0]["query"]) for entry in listed) == 500
    assert (tmp_path / ".neg_q_cache.sqlite").stat().st_size < 40 * 250_000


def test_terminal_escapes_of_a_model_are_written_out(rows: list[dict], tmp_path: Path) -> None:
    with ChatServer(answer=lambda passage, nth: "چه\x9b31m رود") as server:
        assert run(tmp_path, *endpoint(server, "--attempts", 1)) == 0
    listed = (tmp_path / "reports/out.neg_q.rejected.jsonl").read_text()
    assert "\x9b" not in listed and read(tmp_path / "reports/out.neg_q.rejected.jsonl")[0]["tried"][0] == {
        "attempt": 1, "query": "چه\\x9b31m رود", "reason": "control",
    }  # fmt: skip


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


def test_ranks_are_those_of_the_present_search(
    texts: list[str], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are kept, but not for another instruction or another query; a passage in another spelling is the same."""
    waiting = f"  {texts[20]} "
    (tmp_path / "in.jsonl").write_text(json.dumps({"query": "پرسش", "pos": [texts[0]], "neg": [waiting]}) + "\n")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]))
    searched: list[list[str]] = []
    embed = Retriever.embed_queries
    monkeypatch.setattr(Retriever, "embed_queries", lambda self, q: searched.append(list(q)) or embed(self, q))
    words = ["--encoder", tiny_model_dir, "--round_trip_top_k", 60, "--corpus", tmp_path / "corpus.jsonl"]
    words += ["--index_dir", tmp_path / "index", "--overwrite", "--attempts", 1]
    answers = [good_query(waiting), " ".join(texts[20].split()[1:9:2])]
    instructed = ["--query_instruction_for_retrieval", "x: "]
    with ChatServer(answer=lambda passage, nth: answers[nth]) as server:
        for more, count in (([], 1), ([], 1), (instructed, 2), (["--prompt", f"Now {PROMPT}"], 3)):
            assert run(tmp_path, *endpoint(server, *words), *more) == 0
            assert len(searched) == count
    assert searched == [[answers[0]], [answers[0]], [answers[1]]]
    assert read(tmp_path / "out.jsonl")[0]["neg_q"] == [answers[1]]  # found among all 60


# ---- a model on this machine ----


def write_model(folder: Path, chat: bool = False) -> None:
    """A random decoder, with or without a chat template."""
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = "{% for m in messages %}user: {{ m.content }}\n{% endfor %}assistant:"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_what_a_local_model_is_given(tmp_path: Path) -> None:
    write_model(tmp_path / "model", chat=True)
    writing = WritingArguments(max_tokens=4)
    model = LocalModel(LocalModelArguments(str(tmp_path / "model")), writing, EncoderArguments("x"), seed=1)
    encoded = model._encode(["a long question about rivers and bridges " * 9, "short"])
    assert encoded["input_ids"].shape[1] > 40
    assert encoded["attention_mask"][1, 0] == 0, "padded on the left: a decoder goes on at the right"
    shown = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded["input_ids"]]
    assert shown[0].strip().startswith("user: a long") and shown[1].strip().endswith("assistant:")
    saved: list[tuple[str, Answer]] = []
    given = [Task("k1", "a long question about rivers"), Task("k2", "short")]
    assert [task.key for task, _ in model.run(iter(given), saved.extend)] == ["k1", "k2"] and model.sent == 2
    assert saved[0][1].prompt_tokens > saved[1][1].prompt_tokens > 0
    assert all(0 <= answer.completion_tokens <= 4 for _, answer in saved)


@pytest.mark.parametrize("kind", ["seq2seq", "causal", "chat"])
def test_a_local_model_writes_the_same_queries_again(kind: str, rows: list[dict], tmp_path: Path) -> None:
    """Random weights write nothing useful; they show that both kinds load, sample, stop, repeat, and are checked."""
    if kind == "seq2seq":
        tokenizer = build_tokenizer()
        torch.manual_seed(3)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    else:
        write_model(tmp_path / "model", chat=kind == "chat")
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
