"""From bare documents to a training and an eval folder, with a real server, a real local model and real training."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shlex
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import run_script
from conftest import build_tokenizer
from finetune.dev_data import by_the_steps, dev_lines
from mining.chat_server import ChatServer
from mining.corpora import TEXTS
from mining.from_corpus_runs import KINDS, answer, contents, rows, run, words, write_inputs
from transformers import LlamaConfig, LlamaForCausalLM

from FlagEmbedding.collections.source import Source
from FlagEmbedding.finetune.check_data import CheckArguments, check
from FlagEmbedding.mining.from_corpus.arguments import DocumentArguments
from FlagEmbedding.mining.from_corpus.command import main
from FlagEmbedding.mining.from_corpus.prompting import read_examples, with_examples
from FlagEmbedding.mining.from_corpus.sampling import draw, given_files
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.texts import text_key

SEED = 16  # with it passage 0, which is there twice, is dev's: test_passages_are_drawn…


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    write_inputs(tmp_path)


def test_from_documents_to_a_trained_and_measured_model(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(answer=answer) as server:
        assert run(tmp_path, server, tiny_model_dir, "--seed", SEED) == 0
        asked = Counter(request["passage"] for request in server.requests)
    assert set(asked.values()) == {1}
    page = capsys.readouterr().out
    found, dev = rows(tmp_path), Source("en", "dev", tmp_path / "out/eval")
    by_text = {text_key(text): f"d{i}" for i, text in enumerate(TEXTS)}
    topics, qrels = dev.topics(), dev.qrels()
    held_out = {text_key(TEXTS[int(docid[1:])]) for judged in qrels.values() for docid in judged}
    assert len(topics) == 6 and len(held_out) == 2 and qrels["d0_claim"] == {"d0": 1, "d60": 1}
    assert topics["d0_claim"] == answer(f"claim|{TEXTS[0]}")
    for row in found:
        assert row["query"] == answer(f"{row['kind']}|{row['pos'][0]}") and by_text[text_key(row["pos"][0])]
        assert not held_out & {text_key(text) for text in (*row["pos"], *row["neg"])}
        assert len(row["neg"]) == 3 and text_key(row["pos"][0]) not in set(map(text_key, row["neg"]))
        for text, query in zip(row["neg"], row["neg_q"], strict=True):
            assert query in {answer(f"{kind}|{text}") for kind in KINDS}  # this negative answers it
    assert Counter(row["kind"] for row in found) == dict.fromkeys(KINDS, 18)
    assert check(CheckArguments([str(tmp_path / "out/train")]))
    # The printed command runs as printed, and its dev figures before the first step are those of steps 0 to 2.
    program, script, *flags = shlex.split(page.splitlines()[-1])
    assert (program, script) == ("python", "run.py")
    trained = run_script("run.py", [*flags, "--max_steps", 1])
    assert trained.returncode == 0, trained.stderr[-2000:]
    steps = by_the_steps(tiny_model_dir, tmp_path / "out/eval", ["en"], tmp_path / "steps", ["ndcg@10"])
    assert dev_lines(tmp_path / "out/model")[0]["eval_ndcg@10"] == pytest.approx(steps["en"]["ndcg@10"])


def test_passages_are_drawn_by_text_and_seed(tmp_path: Path) -> None:
    files = given_files([str(tmp_path / "docs.jsonl")], tmp_path)
    options = DocumentArguments(["-"], passages=20)
    drawn, counts = draw(files, False, options, SEED)
    assert counts == {"passages": 63, "repeated": 1, "too short": 2, "drawn": 20, "dev": 2}
    assert next(p.docid for p in drawn if p.dev) == "d0" and [int(p.docid[1:]) for p in drawn] == sorted(
        int(p.docid[1:]) for p in drawn
    )
    more, _ = draw(files, False, DocumentArguments(["-"], passages=30), SEED)
    assert {p.key for p in drawn} < {p.key for p in more}
    other = draw(files, False, options, SEED + 1)[0]
    assert {p.key for p in drawn} != {p.key for p in other}
    # Neither order, ids nor files decide.
    lines = (tmp_path / "docs.jsonl").read_text().splitlines()[:60]
    for name, part in (("a", lines[40:]), ("b", lines[:40])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps({"id": f"x{i}{name}", "text": json.loads(line)["text"]}) + "\n" for i, line in enumerate(part))  # fmt: skip  # noqa: E501
    moved, _ = draw(given_files([str(tmp_path / f"{name}.jsonl.gz") for name in "ab"], tmp_path), False, options, SEED)
    assert {(p.key, p.dev) for p in moved} == {(p.key, p.dev) for p in drawn}
    titled = draw(files, True, options, SEED)[0]
    assert all(p.text == f"t{p.docid[1:]} {TEXTS[int(p.docid[1:])]}".strip() for p in titled)
    with pytest.raises(DataError, match=r"0 of 63 passages may have queries \(63 too short"):
        draw(files, False, DocumentArguments(["-"], min_passage_characters=500), SEED)


def test_a_beir_folder_is_its_corpus_and_not_its_queries(tmp_path: Path) -> None:
    beir = tmp_path / "beir"
    beir.mkdir()
    (beir / "corpus.jsonl").write_text('{"_id": "a", "text": "one"}\n')
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "what"}\n')
    assert given_files([str(beir)], tmp_path) == [beir / "corpus.jsonl"]


def test_killed_or_short_of_budget_it_goes_on_and_asks_nothing_twice(tmp_path: Path, tiny_model_dir: Path) -> None:
    with ChatServer(answer=answer) as server:
        assert run(tmp_path, server, tiny_model_dir, output="whole") == 0
        total = len(server.requests)
        assert run(tmp_path, server, tiny_model_dir, "--overwrite", output="whole") == 0
        assert len(server.requests) == total, "the same command again costs nothing"
    with ChatServer(answer=answer, delay=0.05) as server:
        given = words(tmp_path, server, tiny_model_dir, "--max_requests", total - 5, "--concurrency", 2)
        process = multiprocessing.get_context("forkserver").Process(target=main, args=(given,))
        process.start()
        while len(server.requests) < 30 and process.is_alive():
            time.sleep(0.02)
        process.kill()
        process.join()
        assert 30 <= len(server.requests) < 60 and not (tmp_path / "out/train").exists()
        server.delay = 0
        assert main(given) == 0
        before = len(server.requests)
        assert before == total - 5, "the killed run's requests count"
        repeated = [passage for passage, count in server.counts.items() if count > 1]
        assert len(repeated) <= 2, "only what was under way when it was killed"
        record = json.loads((tmp_path / "out/from_corpus.json").read_text())
        assert record["stages"]["neg_q"]["not_asked"] == 5 + len(repeated)
        assert run(tmp_path, server, tiny_model_dir, "--overwrite") == 0
        assert len(server.requests) == total + len(repeated)
    assert contents(tmp_path) == contents(tmp_path, "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_dry_run_says_what_the_first_round_asks(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with ChatServer(answer=answer) as server:
        asked = ["--dry_run", "--prices", 1000, 2000, "--max_tokens", 100, "--attempts", 1]
        assert run(tmp_path, server, tiny_model_dir, *asked) == 0
        assert not server.requests and sorted(tmp_path.rglob("*")) == before
        page = capsys.readouterr().out
        # 20 of each kind; 60 texts may be negatives, 20 of them drawn; the two too short ones count once.
        assert page.count(": 20 requests to m") == 3 and "neg_q, at most: 42 requests" in page
        tokens = [int(line.split("about ")[1].split(" ")[0].replace(",", "")) for line in page.splitlines() if "about" in line]  # fmt: skip  # noqa: E501
        assert f"at most {(sum(tokens) * 1000 + 102 * 100 * 2000) / 1e6:.2f}" in page
        assert all(f"The first prompt for {kind}:\n\n<p>{kind}|The " in page for kind in KINDS)
        assert run(tmp_path, server, tiny_model_dir, "--attempts", 1, "--neg_q", "none") == 0
        assert len(server.requests) == 60
        assert run(tmp_path, server, tiny_model_dir, "--dry_run") == 0
        assert capsys.readouterr().out.count(": 0 requests to m in the first round, about 0 prompt tokens; the cache has 20") == 3  # fmt: skip  # noqa: E501
    assert all("neg_q" not in row for row in rows(tmp_path))


def test_a_model_on_this_machine_writes_them(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A tiny decoder that was taught what the passages read like; its queries are poor and in the right language."""
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    pairs = [(tokenizer(f"Ask {text}")["input_ids"], tokenizer(answer(f"keywords|{text}"))["input_ids"][1:]) for text in TEXTS[:60:2]]  # fmt: skip  # noqa: E501
    batch = tokenizer.pad({"input_ids": [prompt + query for prompt, query in pairs]}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (prompt, _) in zip(labels, pairs, strict=True):
        row[: len(prompt)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    for output in ("out", "again"):
        given = [
            "--corpus", tmp_path / "docs.jsonl", "--output_dir", tmp_path / output, "--encoder", tiny_model_dir,
            "--local_model", tmp_path / "decoder", "--max_tokens", 24, "--passages", 20, "--prompt", "Ask {passage}",
            "--language", "en", "--round_trip_top_k", 63, "--range_for_sampling", "0-40", "--negative_number", 2,
            "--cache", tmp_path / f"{output}.sqlite", "--kinds", "question", "--neg_q", "reuse",
        ]  # fmt: skip
        assert main(list(map(str, given))) == 0
    assert contents(tmp_path) == contents(tmp_path, "again")
    found = rows(tmp_path)
    assert found and len({row["query"] for row in found}) == len(found)
    assert check(CheckArguments([str(tmp_path / "out/train")]))
    known = {text_key(row["pos"][0]): row["query"] for row in found}
    queries = [(known.get(text_key(text)), query) for row in found for text, query in zip(row["neg"], row["neg_q"], strict=True)]  # fmt: skip  # noqa: E501
    assert all(query == (own or "") for own, query in queries) and any(query for _, query in queries)


def test_prompts_show_the_users_own_queries(tmp_path: Path, tiny_model_dir: Path) -> None:
    log = {
        "log.txt": "how deep is the lake\n\n한강의 길이\nhow deep  is the lake\n",
        "topics.tsv": "1\twhere is Lut\n", "rows.jsonl": '{"query": "lake depth", "pos": ["p"]}\n',
        "queries.jsonl": '{"_id": "1", "text": "old bridges"}\n',
    }  # fmt: skip
    for name, text in log.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = [str(tmp_path / name) for name in log]
    examples = read_examples(names)
    assert examples == ["how deep is the lake", "한강의 길이", "where is Lut", "lake depth", "old bridges"]
    prompt = with_examples(lambda passage: f"Ask: {passage}", examples, 2, 1)
    shown = [line[2:] for line in prompt(TEXTS[0]).splitlines() if line.startswith("- ")]
    assert len(set(shown)) == 2 <= len(set(shown) & set(examples) - {"한강의 길이"})
    assert prompt("한강은 서울을 지나").count("- ") == 1 and "- 한강의 길이" in prompt("한강은 서울을 지나")
    assert prompt("رود کارون") == "Ask: رود کارون", "nobody asks in this script"
    assert len({tuple(prompt(text).splitlines()[1:3]) for text in TEXTS[:20]}) > 3, "drawn for each passage"
    with ChatServer(answer=answer) as server:
        assert run(tmp_path, server, tiny_model_dir, "--examples", *names, "--dry_run") == 0
        asked = ["--examples", *names, "--neg_q", "none", "--kinds", "claim"]
        assert run(tmp_path, server, tiny_model_dir, *asked) == 0
        bodies = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert len(bodies) == 20 and all(body.count("\n- ") == 4 for body in bodies), "all four of the passages' script"
    for name, text, problem in (
        ("a.txt", "\n", "no query in it"), ("b.jsonl", '{"q": 1}\n', "b.jsonl:1: query is no text"),
        ("c.txt", None, "c.txt"),
    ):  # fmt: skip
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=problem):
            read_examples([str(tmp_path / name)])


def test_nothing_is_written_where_too_few_queries_pass(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(answer=lambda message, nth: "I'm sorry, I cannot do that.") as server:
        assert run(tmp_path, server, tiny_model_dir, "--attempts", 1) == 2
    assert "0 queries for training and 0 for dev passed the checks (refusal: 60)" in capsys.readouterr().err
    assert not (tmp_path / "out/train").exists() and not (tmp_path / "out/eval").exists()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--model '' --base_url ''", "--model (with --base_url), or --local_model"),
        ("--model ''", "has no effect without --model"),
        ("--local_model x", "give one of them"),
        ("--encoder ''", "--encoder is missing"),
        ("--kinds question question", "named twice"),
        ("--kinds ../x", "give a word of letters"),
        ("--kinds haiku", "no prompt of that name"),
        ("--prompt 'Ask {passage}'", "there are several --kinds"),
        ("--prices 1", "give two numbers"),
        ("--prices 1 2", "--prices has no effect without --dry_run"),
        ("--dev_share 1", "must be below 1"),
        ("--passages 0", "must be at least 1"),
        ("--passages 1", "at least one must be left for training"),
        ("--neg_q none --reuse_from docs.jsonl", "no effect with --neg_q none"),
        ("--examples_per_prompt 3", "no effect without --examples"),
        ("--examples missing.jsonl", "missing.jsonl"),
        ("--language ../en", "give a code such as ko"),
        ("--random_negatives --relative_margin 0.1", "no effect with --random_negatives"),
        ("--negative_number 50", "is more than --range_for_sampling"),
        ("--output_dir docs.jsonl", "is a file"),
        ("--output_dir theirs", "no from_corpus.json says that this command wrote it"),
        ("--corpus nothing.jsonl", "there is no such corpus"),
    ],
)
def test_what_cannot_work_is_refused(
    given: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs/train").mkdir(parents=True)
    with ChatServer() as server:
        assert run(tmp_path, server, Path("no-model"), *shlex.split(given)) == 2
        assert not server.requests
    error = capsys.readouterr().err
    assert problem in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_what_others_put_there_is_never_removed(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.md").write_text("of a training run")
    with ChatServer(answer=answer) as server:
        assert run(tmp_path, server, tiny_model_dir) == 2
        assert "report.md is there, and no from_corpus.json says" in capsys.readouterr().err
        (tmp_path / "out/report.md").unlink()
        (tmp_path / ".out.work").mkdir()
        (tmp_path / ".out.work/photo.txt").write_text("mine")
        assert run(tmp_path, server, tiny_model_dir, "--dry_run") == 0 == run(tmp_path, server, tiny_model_dir)
        assert [path.name for path in (tmp_path / ".out.work").iterdir()] == ["photo.txt"]
        (tmp_path / "out/train/photo.txt").write_text("mine")
        assert run(tmp_path, server, tiny_model_dir, "--overwrite") == 2
        assert "out/train/photo.txt is not of the run" in capsys.readouterr().err
    assert (tmp_path / "out/train/photo.txt").read_text() == "mine" and rows(tmp_path)
