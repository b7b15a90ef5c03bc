"""One folder in other libraries' hands, with the real libraries (extra ``interop``); what is not there is skipped."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY


def script() -> ModuleType:
    """``benchmarks/load_table.py``, which prints the same as a table."""
    spec = importlib.util.spec_from_file_location("load_table", REPOSITORY / "benchmarks" / "load_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table = script()
UPSTREAM = "FlagEmbedding (upstream)"
HERE = [name for name, library in table.LIBRARIES.items() if name != UPSTREAM and library.here]
if len(HERE) <= 2:  # sentence-transformers and transformers have tests/modeling/test_interchange.py
    pytest.skip("none of the libraries of the extra interop is installed", allow_module_level=True)
PAIRS = [(name, kind) for name in HERE for kind in table.LIBRARIES[name].kinds]


@pytest.fixture(scope="module")
def cases(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("load_table")
    made = table.make_cases(str(tiny_model_dir), root / "checkpoints")
    (root / "cases.json").write_text(json.dumps([asdict(case) for case in made]), "utf-8")
    return {case.kind: case for case in made}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_same_vectors(name: str, kind: str, cases: dict[str, Any]) -> None:
    found, expected = table.LIBRARIES[name].vectors(cases[kind]), table.own_vectors(cases[kind])
    assert [np.shape(v) for v in found] == [v.shape for v in expected] == [(3, 32), (4, 32)]
    assert table.least_cosine(found, expected) > 0.999999


def test_kinds_and_texts_are_told_apart(cases: dict[str, Any]) -> None:
    """Otherwise equal vectors would say nothing."""
    dense, experts, mean = (table.own_vectors(cases[kind]) for kind in table.KINDS[:3])
    assert table.least_cosine(experts, dense) < 0.999 and table.least_cosine(mean, dense) < 0.999
    assert table.least_cosine((dense[1][:3], dense[1][:3]), (dense[1][1:], dense[1][1:])) < 0.99
    bare = table.Case(**{**asdict(cases["mean, instructions"]), "query_instruction": "", "passage_instruction": ""})
    assert table.least_cosine(table.transformers(bare), mean) < 0.9999


def test_milvus_is_given_sparse_and_colbert_vectors_too(cases: dict[str, Any]) -> None:
    hybrid = pytest.importorskip("pymilvus.model.hybrid")
    from FlagEmbedding import BGEM3FlagModel

    folder = cases["M3 heads"].folder
    model = hybrid.BGEM3EmbeddingFunction(folder, device="cpu", use_fp16=False, return_colbert_vecs=True)
    found = model.encode_documents(table.PASSAGES)
    own = BGEM3FlagModel(folder, devices="cpu", use_fp16=False)
    expected = own.encode(table.PASSAGES, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    sparse = found["sparse"].toarray()
    assert sparse.shape[0] == len(table.PASSAGES) and (sparse > 0).any()
    for row, weights in zip(sparse, expected["lexical_weights"], strict=True):
        assert {int(i): row[i] for i in row.nonzero()[0]} == pytest.approx({int(k): v for k, v in weights.items() if v})
    for mine, theirs in zip(found["colbert_vecs"], expected["colbert_vecs"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.skipif("UPSTREAM_PYTHON" not in os.environ, reason="UPSTREAM_PYTHON names no Python with upstream 1.4.2")
def test_upstream_reads_the_dense_kinds(cases: dict[str, Any]) -> None:
    place = Path(cases["dense"].folder).parents[1]
    options = argparse.Namespace(python=sys.executable, upstream_python=os.environ["UPSTREAM_PYTHON"])
    answer = table._ask(UPSTREAM, options, place)
    assert answer.get("version") == "1.4.2", answer.get("problem")
    for kind, found in answer["vectors"].items():
        assert table.least_cosine(found, table.own_vectors(cases[kind])) > 0.999999
    assert set(answer["vectors"]) == {"dense", "mean, instructions", "M3 heads"}
