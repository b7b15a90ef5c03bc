"""The public classes put before the texts what the checkpoint says, unless they are told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXTS
from tokenizers import processors
from transformers import AutoTokenizer

from FlagEmbedding import BGEM3FlagModel, FlagModel


@pytest.fixture(scope="module")
def told(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told") / "told"
    shutil.copytree(tiny_model_dir, folder)
    said = {"prompts": {"query": "Q: ", "document": "P: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("arguments", "query", "passage"),
    [
        ({}, "Q: ", "P: "),
        ({"query_instruction_format": "<{}>{}", "passage_instruction_format": "<{}>{}"}, "Q: ", "P: "),
        ({"query_instruction_for_retrieval": ""}, "", "P: "),
        ({"query_instruction_for_retrieval": "x", "query_instruction_format": "<{}>{}"}, "<x>", "P: "),
        ({"passage_instruction_for_retrieval": "y: "}, "Q: ", "y: "),
    ],
)
def test_what_stands_before_the_texts(arguments: dict[str, Any], query: str, passage: str, told: Path) -> None:
    model, m3 = FlagModel(str(told), **arguments), BGEM3FlagModel(str(told), **arguments)
    queries, passages = (model.encode([before + text for text in TEXTS]) for before in (query, passage))
    np.testing.assert_array_equal(model.encode_queries(TEXTS), queries)
    np.testing.assert_array_equal(model.encode_corpus(TEXTS), passages)
    np.testing.assert_array_equal(m3.encode_queries(TEXTS)["dense_vecs"], queries)
    np.testing.assert_array_equal(m3.encode_corpus(TEXTS)["dense_vecs"], passages)


def test_another_instruction_than_the_checkpoints_is_one_line(told: Path, caplog: pytest.LogCaptureFixture) -> None:
    FlagModel(str(told), query_instruction_for_retrieval="Q: ")
    assert not caplog.records
    FlagModel(str(told), query_instruction_for_retrieval="x: ")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"--query_instruction_for_retrieval 'x: ': {told} says 'Q: '; going on as the flag says"


def test_an_empty_text_without_special_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(tmp_path / "bare")
    model = FlagModel(str(tmp_path / "bare"))
    assert model.tokenizer("").input_ids == []
    found = model.encode(["", TEXTS[0]])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], model.encode(TEXTS[0]), atol=1e-5)
