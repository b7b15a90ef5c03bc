"""Every option of the commands that convert, merge, sample and split rows acts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mining.corpora import TEXTS, write_collections, write_rows
from options_walk import Case, assert_acts, assert_complete
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from FlagEmbedding.mining import convert, merge, sample, score, split_data_by_length
from FlagEmbedding.mining.common.options import OutputArguments, RerankerArguments

HUB = "only for what comes from the hub"
OUTPUT = {"output_file": "every run writes its own"}
MIRACL = "--format miracl --language ko --data_dir data"
CONVERT_CASES = {
    "format": Case("--format beir", given="--input Beir", only=("code", "rows")),
    "input": Case("--input b.jsonl", given="--format triples --input a.jsonl", only=("rows",)),
    "data_dir": Case("--data_dir other", given=MIRACL, only=("rows",)),
    "language": Case("--language fa", given=MIRACL, only=("rows",)),
    "split": Case("--split dev", given=MIRACL, only=("rows",)),
    "negatives": Case("--negatives none", given=MIRACL, only=("rows",)),
    "with_title": Case("--with_title", given=MIRACL, only=("rows",)),
    "overwrite": Case("--overwrite", given=f"{MIRACL} THERE", only=("code", "rows")),
}
MERGE_CASES = {
    "input_file": Case("--input_file a.jsonl b.jsonl", given="--input_file a.jsonl", only=("rows",)),
    "keep_repeated": Case("--keep_repeated", given="--input_file a.jsonl a.jsonl", only=("rows", "said")),
    "overwrite": Case("--overwrite", given="--input_file a.jsonl THERE", only=("code", "rows")),
}
SAMPLE_CASES = {
    "input_file": Case("--input_file b.jsonl", given="--input_file a.jsonl --number 5", only=("rows",)),
    "number": Case("--number 7", given="--input_file a.jsonl", only=("code", "rows")),
    "share": Case("--share 0.25", given="--input_file a.jsonl", only=("code", "rows")),
    "seed": Case("--seed 7", given="--input_file a.jsonl --number 5", only=("rows",)),
    "overwrite": Case("--overwrite", given="--input_file a.jsonl --number 5 THERE", only=("code", "rows")),
}
SCORED = "--input_file few.jsonl --reranker reranker"
SCORE_CASES = {
    "input_file": Case("--input_file fewer.jsonl", given=SCORED, only=("rows",)),
    "cross_encoder": Case("--reranker another", given=SCORED, only=("rows",)),
    "cross_encoder_max_length": Case("--cross_encoder_max_length 8", given=SCORED, only=("rows",)),
    "overwrite": Case("--overwrite", given=f"{SCORED} THERE", only=("code", "rows")),
}
SPLIT = "--input_path a.jsonl --length_list 0 20 --model_name_or_path model"
SPLIT_CASES = {
    "input_path": Case("--input_path b.jsonl", given=SPLIT, only=("files",)),
    "output_dir": Case("--output_dir elsewhere", given=SPLIT, only=("files",)),
    "log_name": Case("--log_name log.jsonl", given=SPLIT, only=("files",)),
    "length_list": Case("--length_list 0 10 20", given=SPLIT, only=("files", "said")),
    "model_name_or_path": Case("--model_name_or_path words", given=SPLIT, only=("said",)),
    "num_proc": Case("--num_proc 1", given=SPLIT, only=("threads",)),
    "overwrite": Case("--overwrite", given=f"{SPLIT} THERE", only=("files",)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, cross_encoder_dir: Path) -> Path:
    """MIRACL collections in two languages, two splits and two folders, a BEIR folder, rows, tokenizers."""
    folder = tmp_path_factory.mktemp("tools")
    write_collections(folder)
    (folder / "Beir/qrels").mkdir(parents=True)
    write_rows(folder / "Beir/corpus.jsonl", [{"_id": "d0", "title": "T", "text": TEXTS[0]}])
    write_rows(folder / "Beir/queries.jsonl", [{"_id": "q0", "text": "which one?"}])
    (folder / "Beir/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    for name, first in (("a", 0), ("b", 20)):
        rows = [{"query": f"q{i}", "pos": "P" * i, "neg": "a river " * (i % 9)} for i in range(first + 1, first + 30)]
        write_rows(folder / f"{name}.jsonl", [{**row, "neg": row["neg"] or "N"} for row in rows])
    for name, first in (("few", 1), ("fewer", 4)):
        row = {"query": "where?", "pos": "the river " * 9}
        write_rows(folder / f"{name}.jsonl", [{**row, "neg": "a river " * i} for i in range(first, 6)])
    shutil.copytree(cross_encoder_dir, folder / "another")
    weights = load_file(folder / "another/model.safetensors")
    save_file({name: weight * 1.1 for name, weight in weights.items()}, folder / "another/model.safetensors")
    (folder / "reranker").symlink_to(cross_encoder_dir)
    (folder / "model").symlink_to(tiny_model_dir)
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder / "words")
    return folder


Observe = Callable[[ModuleType, str, list[str]], Mapping[str, Any]]


@pytest.fixture
def observe(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Observe:
    """Runs a command in a fresh folder, where ``THERE`` stands with an output there; what it wrote and said."""

    def run(command: ModuleType, output: str, words: list[str]) -> Mapping[str, Any]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if "THERE" in words:
            (folder / "out.jsonl").write_text("there\n")
            (folder / "out").mkdir()
            (folder / "out/a_len-0-20.jsonl").write_text("there\n")
        names = {path.name: str(path) for path in place.iterdir()} | {"elsewhere": str(folder / "elsewhere")}
        given = [output, str(folder / ("out" if output == "--output_dir" else "out.jsonl"))]
        os.environ.pop("RAYON_NUM_THREADS", None)
        code = command.main([*given, *(names.get(word, word) for word in words if word != "THERE")])
        said = capsys.readouterr().out.replace(str(folder), "").replace(str(place), "")
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        rows = {name: path.read_text() for name, path in files.items() if "log" not in name}  # a log has times in it
        return {
            "code": code, "said": said, "files": [sorted(files), rows], "rows": rows.get("out.jsonl"),
            "threads": os.environ.get("RAYON_NUM_THREADS"),
        }  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("groups", "cases", "exempt"),
    [
        ((convert.ConvertArguments, OutputArguments), CONVERT_CASES, {**OUTPUT, "cache_dir": HUB}),
        ((merge.MergeArguments, OutputArguments), MERGE_CASES, OUTPUT),
        ((sample.SampleArguments, OutputArguments), SAMPLE_CASES, OUTPUT),
        (
            (score.ScoreRowsArguments, RerankerArguments, OutputArguments),
            SCORE_CASES,
            {
                **OUTPUT,
                "cache_dir": HUB,
                "trust_remote_code": "only for rerankers that come with code",
                "cross_encoder_batch_size": "pairs at a time: no score depends on it beyond rounding",
            },
        ),
        ((split_data_by_length.SplitArguments,), SPLIT_CASES, {"cache_dir": HUB}),
    ],
)
def test_no_field_is_left_out(groups: tuple[type, ...], cases: dict[str, Case], exempt: dict[str, str]) -> None:
    assert_complete(groups, cases, exempt)


@pytest.mark.parametrize("name", CONVERT_CASES)
def test_every_option_of_convert_acts(name: str, observe: Observe) -> None:
    assert_acts(CONVERT_CASES[name], lambda words: observe(convert, "--output_file", words))


@pytest.mark.parametrize("name", MERGE_CASES)
def test_every_option_of_merge_acts(name: str, observe: Observe) -> None:
    assert_acts(MERGE_CASES[name], lambda words: observe(merge, "--output_file", words))


@pytest.mark.parametrize("name", SAMPLE_CASES)
def test_every_option_of_sample_acts(name: str, observe: Observe) -> None:
    assert_acts(SAMPLE_CASES[name], lambda words: observe(sample, "--output_file", words))


@pytest.mark.parametrize("name", SCORE_CASES)
def test_every_option_of_score_acts(name: str, observe: Observe) -> None:
    assert_acts(SCORE_CASES[name], lambda words: observe(score, "--output_file", words))


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_every_option_of_split_data_by_length_acts(name: str, observe: Observe) -> None:
    assert_acts(SPLIT_CASES[name], lambda words: observe(split_data_by_length, "--output_dir", words))


def test_the_split_of_beir_is_that_of_its_judgments(place: Path, observe: Observe) -> None:
    judged = (place / "Beir/qrels/train.tsv").read_text()
    (place / "Beir/qrels/test.tsv").write_text(judged.replace("\t1", "\t0") + "q0\td0\t0\n")
    found = observe(convert, "--output_file", ["--format", "beir", "--input", "Beir", "--split", "test"])
    assert found["code"] == 2 and found["rows"] is None  # nothing relevant there
    (place / "Beir/qrels/dev.tsv").write_text(judged.replace("d0", "d9"))
    found = observe(convert, "--output_file", ["--format", "beir", "--input", "Beir", "--split", "dev"])
    assert found["code"] == 2 and found["rows"] is None  # relevant, and not in the corpus
    found = observe(convert, "--output_file", ["--format", "beir", "--input", "Beir"])
    assert json.loads(found["rows"]) == {"query": "which one?", "pos": [f"T {TEXTS[0]}"]}
