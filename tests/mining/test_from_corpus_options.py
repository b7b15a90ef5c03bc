"""Every option of from_corpus acts. Groups that it shares with other commands are walked there; one option of each
shows here that the group goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mining.chat_server import ChatServer
from mining.from_corpus_runs import answer, contents, run, write_inputs
from options_walk import Case, assert_acts, assert_complete, flag_fields

from FlagEmbedding.mining.from_corpus.arguments import (
    DocumentArguments,
    FolderArguments,
    FromCorpusOptions,
    KindArguments,
)
from FlagEmbedding.utils.cli import parse_whole

Observe = Callable[[list[str]], dict[str, Any]]

FEW = "--kinds question --neg_q none --passages 10"  # a short run
CASES = {
    "corpus": Case("--corpus more.jsonl", FEW, only=("files",)),
    "passages": Case("--passages 12", FEW, only=("asked",)),
    "dev_share": Case("--dev_share 0.3", FEW, only=("files",)),
    "min_passage_characters": Case("--min_passage_characters 60", FEW, only=("asked",)),
    "max_passage_characters": Case("--max_passage_characters 60", FEW, only=("asked",)),
    "with_scores": Case("--with_scores", FEW, only=("files",)),
    "kinds": Case("--kinds claim question", FEW, only=("files", "asked")),
    "examples": Case("--examples log.txt", FEW, only=("asked",)),
    "examples_per_prompt": Case("--examples_per_prompt 1", f"{FEW} --examples log.txt", only=("asked",)),
    "round_trip_top_k": Case("--round_trip_top_k 48", f"{FEW} --attempts 1", only=("files",)),
    "neg_q": Case("--neg_q reuse", "--kinds question --passages 10", only=("files", "asked")),
    "reuse_from": Case("--reuse_from rows.jsonl", "--kinds question --neg_q reuse --passages 10", only=("files",)),
    "prices": Case("--prices 1 2", f"{FEW} --dry_run", only=("page",)),
    # One of each group that other commands have.
    "max_requests": Case("--max_requests 7", FEW, only=("asked",)),  # EndpointArguments
    "cache": Case("--cache other.sqlite", FEW, only=("index",)),  # WritingArguments
    "max_length": Case("--max_length 39", f"{FEW} --attempts 1", only=("files",)),  # CheckArguments
    "pooling_method": Case("--pooling_method mean", f"{FEW} --with_scores", only=("files",)),  # MiningEncoder
    "with_title": Case("--with_title", FEW, only=("files", "asked")),  # SearchArguments
    "index_save_dir": Case("--index_save_dir elsewhere", FEW, only=("index",)),
    "seed": Case("--seed 7", FEW, only=("files", "asked")),  # Sampling
    "min_score": Case("--min_score 0.99", f"{FEW} --fill none", only=("files",)),  # ScoreFilters
}
OWN = (DocumentArguments, FolderArguments, KindArguments)
EXEMPT = {"output_dir": "every run writes its own", "overwrite": "test_from_corpus: killed, and again"}


def test_no_field_of_from_corpus_is_left_out() -> None:
    shared = {"max_requests", "cache", "max_length", "pooling_method", "with_title", "index_save_dir", "seed", "min_score"}  # fmt: skip  # noqa: E501
    assert_complete(OWN, set(CASES) - shared, EXEMPT)
    assert not flag_fields(OWN) & shared


@pytest.fixture(scope="module")
def observe(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Observe:
    """What a command line makes, once for each: most cases compare with the same short run. The index stays."""
    folder = tmp_path_factory.mktemp("options")
    write_inputs(folder)
    docs = (folder / "docs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "more.jsonl").write_text("".join(docs[:50]), encoding="utf-8")
    (folder / "log.txt").write_text("old harbour Busan\nwhere is the desert\n")
    rows = [{"query": f"mine {i}", "pos": [json.loads(line)["text"]], "neg": ["-"]} for i, line in enumerate(docs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @cache
    def made(*given: str) -> dict[str, Any]:
        with (
            ChatServer(answer=answer) as server,
            pytest.MonkeyPatch.context() as moved,
            redirect_stdout(StringIO()) as page,
        ):
            moved.chdir(folder)
            assert run(folder, server, tiny_model_dir, "--overwrite", *given) == 0
            asked = sorted(request["body"]["messages"][0]["content"] for request in server.requests)
        index = sorted(str(path) for name in ("index", "*.sqlite") for path in folder.rglob(name))
        seen = {"files": contents(folder), "asked": asked, "page": page.getvalue(), "index": index}
        for path in (*(folder / f"out/{name}" for name in ("train", "eval")), folder / "elsewhere"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob("*.sqlite"):
            path.unlink()
        return seen

    return lambda given: made(*given)


@pytest.mark.parametrize("name", CASES)
def test_every_option_acts(name: str, observe: Observe) -> None:
    assert_acts(CASES[name], observe)


def test_an_index_with_titles_is_not_searched_for_passages_without(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the flag is left out, too: passages were drawn without titles, and none of them would be found."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [*FEW.split(), "--index_dir", "titled"]
    with ChatServer(answer=answer) as server:
        assert run(tmp_path, server, tiny_model_dir, *given, "--with_title") == 0
        before = len(server.requests)
        assert run(tmp_path, server, tiny_model_dir, *given, output="other") == 2
        assert len(server.requests) == before
    assert "titled was made with titles: give --with_title True" in capsys.readouterr().err
    assert (tmp_path / "titled/index").is_file() and not (tmp_path / "other").exists()


def test_the_defaults() -> None:
    words = ["--corpus", "c", "--output_dir", "o", "--encoder", "e", "--model", "m"]
    found = parse_whole(FromCorpusOptions, words, "")
    assert found.documents == DocumentArguments(["c"], 1_000, 0.1, 40, 4_000)
    assert found.kinds == KindArguments(["question", "keywords", "claim"], [], 5, 10, "generate", [], [])
    assert found.output == FolderArguments("o", False, False)
    assert (found.sampling.range_for_sampling, found.sampling.negative_number, found.checks.attempts) == ("10-210", 15, 3)  # fmt: skip  # noqa: E501
