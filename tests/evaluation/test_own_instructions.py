"""Steps 0 and 1 put before the texts what the checkpoint was trained with, unless they are told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from FlagEmbedding.evaluation.__main__ import generate_embedding, search_results
from FlagEmbedding.evaluation.arguments import BGE_INSTRUCTION


@pytest.fixture(scope="module")
def told(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told") / "told"
    shutil.copytree(tiny_model_dir, folder)
    prompts = {"query": "Q: ", "passage": "P: "}  # sentence-transformers takes document, passage or corpus
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def record_of(model: Path, collection: Path, out: Path, *search: str, embed: tuple[str, ...] = ()) -> tuple[dict, str]:
    """Step 1's record, and the run."""
    shared = ["--encoder", str(model), "--languages", "ko", "--data_dir", str(collection)]
    shared += ["--index_save_dir", str(out / "index")]
    assert generate_embedding([*shared, *embed]) == 0
    assert search_results([*shared, "--result_save_dir", str(out / "runs"), "--hits", "5", *search]) == 0
    run = out / "runs" / model.name / "ko.txt"
    return json.loads(run.with_suffix(".json").read_text()), run.read_text()


def test_the_checkpoints_own(told: Path, tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    record, run = record_of(told, collection, tmp_path / "own")
    assert (record["query_instruction"], record["index"]["passage_instruction"]) == ("Q: ", "P: ")
    words = ("--query_instruction_for_retrieval", "Q: ")
    given, same = record_of(
        tiny_model_dir, collection, tmp_path / "given", *words, embed=("--passage_instruction_for_retrieval", "P: ")
    )
    assert same == run
    assert given["query_instruction"] == "Q: "


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--add_instruction", "False"), None),
        (("--add_instruction", "True"), "Q: "),
        (("--query_instruction_for_retrieval", "other: "), "other: "),
        (("--query_instruction_for_retrieval", ""), None),
    ],
)
def test_what_the_flags_make_of_it(
    words: tuple[str, ...], expected: str | None, told: Path, collection: Path, tmp_path: Path
) -> None:
    record, _ = record_of(told, collection, tmp_path, *words, embed=("--passage_instruction_for_retrieval", ""))
    assert record["query_instruction"] == expected
    assert record["index"]["passage_instruction"] is None


def test_a_checkpoint_that_says_nothing_gets_bges(tiny_model_dir: Path, collection: Path, tmp_path: Path) -> None:
    record, _ = record_of(tiny_model_dir, collection, tmp_path, "--add_instruction", "True")
    assert record["query_instruction"] == BGE_INSTRUCTION
