"""Every option of the exports acts on what is written or measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.export.__main__ import main
from FlagEmbedding.export.arguments import FoldArguments, OnnxArguments, SampleArguments, SourceArguments
from tests.dev_collection import write_judged

DEV = "--eval_data_dir {data} --eval_languages ko"
KINDS, GRAPH = ("kinds",), ("graph",)
FOLD = {
    "method": Case("--method average", given=DEV, only=("weights",)),
    "pooling_method": Case("--pooling_method mean", given=DEV, only=KINDS),
    "data": Case("--data {rows}", given=DEV, only=("weights", "kinds")),
    "samples": Case("--samples 3", given=DEV, only=("weights", "kinds")),
    "eval_data_dir": Case(DEV, given="--data {rows}", only=KINDS),
    "eval_languages": Case("--eval_languages ko fa", given=DEV, only=KINDS),
    "eval_split": Case("--eval_split train", given=DEV, only=KINDS),
    "eval_query_length": Case("--eval_query_length 4", given=DEV, only=KINDS),
    "eval_passage_length": Case("--eval_passage_length 5", given=DEV, only=KINDS),
    "query_instruction_for_retrieval": Case("--query_instruction_for_retrieval 'river '", given=DEV, only=KINDS),
    "passage_instruction_for_retrieval": Case("--passage_instruction_for_retrieval 'river '", given=DEV, only=KINDS),
}  # fmt: skip
ONNX = {
    "heads": Case("--heads sparse", only=GRAPH),
    "int8": Case("--int8", only=("kinds", "files")),
}  # fmt: skip
FOLD_EXEMPT = {
    "model": "given in every test of the room",
    "output_dir": "read in every test of the room",
    "overwrite": "test_average_and_one_expert",
    "cache_dir": "the hub's, see tests/utils/test_hub.py",
}


def test_no_field_is_left_out() -> None:
    assert_complete((SourceArguments, FoldArguments, SampleArguments, DevArguments), FOLD, FOLD_EXEMPT)
    assert_complete((OnnxArguments,), ONNX, {})  # the other groups are those of fold, read by the same code


@pytest.fixture
def place(tmp_path: Path, tiny_moe_dir: Path, sample_dir: Path) -> dict[str, str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "한강", "pos": ["गंगा नदी हिमालय से निकलकर"], "neg": ["no"]}\n', encoding="utf-8")
    return {"data": str(write_judged(tmp_path / "data")), "rows": str(rows)}


def observe(command: str, model: Path, words: list[str], out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    assert main([command, str(model), "--output_dir", str(out), *words]) == 0
    record = json.loads((out / "export.json").read_text())
    kinds = {
        name: {key: value for key, value in kind.items() if key != "query_milliseconds"}
        for name, kind in record["kinds"].items()
    }
    files = {file: (out / file).stat().st_size for file in record["files"] if file != "export.json"}
    graph = record.get("heads")
    weights = (out / "model.safetensors").read_bytes() if command == "fold" else None
    return {"kinds": kinds, "files": sorted(files), "graph": graph, "weights": weights}


@pytest.mark.parametrize("name", FOLD)
def test_every_option_of_fold_acts(name: str, place: dict[str, str], tiny_moe_dir: Path, tmp_path: Path) -> None:
    def run(words: list[str]) -> dict[str, Any]:
        return observe("fold", tiny_moe_dir, [word.format(**place) for word in words], tmp_path / "out")

    assert_acts(FOLD[name], run)


@pytest.mark.parametrize("name", ONNX)
def test_every_option_of_onnx_acts(name: str, tiny_heads_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert_acts(ONNX[name], lambda words: observe("onnx", tiny_heads_dir, words, tmp_path / "out"))
