"""FlagReranker against transformers' own forward of each pair by itself; FlagAutoModel; names of upstream's."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import FlagEmbedding
from FlagEmbedding import BGEM3FlagModel, FlagAutoModel, FlagAutoReranker, FlagModel, FlagReranker
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

PAIRS = [
    ("강", "The Han river runs through Seoul and reaches the Yellow Sea."),
    ("how long is the river", "강은 서울을 지나 서해로 흘러든다."),
    ("river " * 60, "the river and the sea " * 40),  # both are cut at 48 tokens
    ("river", "the river and the sea " * 40),
    ("sea " * 30, ""),
]


def write_reranker(folder: Path, labels: int = 1) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=130, type_vocab_size=1, pad_token_id=tokenizer.pad_token_id, num_labels=labels,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reranker(tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="module")
def reranker(folder: Path) -> FlagReranker:
    return FlagReranker(str(folder), max_length=48)


def by_hand(folder: Path, pairs: list[tuple[str, str]], query_length: int = 36, length: int = 48) -> list[float]:
    """Upstream's way with one pair at a time: the query's first tokens, then as much of the passage as fits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    scores = []
    for query, passage in pairs:
        q = tokenizer(query, add_special_tokens=False)["input_ids"][:query_length]
        p = tokenizer(passage, add_special_tokens=False)["input_ids"][: length - len(q) - 3]
        ids = torch.tensor([[first, *q, last, *p, last]])  # the template of this tokenizer
        with torch.inference_mode():
            scores.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    return scores


def test_scores_are_those_of_transformers(folder: Path, reranker: FlagReranker) -> None:
    expected = by_hand(folder, PAIRS)
    assert np.ptp(expected) > 0.1
    for size in (1, 2, 128):
        assert reranker.compute_score(PAIRS, batch_size=size) == pytest.approx(expected, abs=1e-5)
    scores = reranker.compute_score(PAIRS, normalize=True)
    assert scores == pytest.approx([1 / (1 + np.exp(-logit)) for logit in expected], abs=1e-6)
    assert FlagReranker(str(folder), max_length=48, normalize=True).compute_score(PAIRS) == scores
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("words", "lengths"),
    [({"max_length": 24}, (18, 24)), ({"query_max_length": 5}, (5, 48)), ({"max_length": 90}, (67, 90))],
)
def test_lengths_of_a_call_and_of_the_constructor(
    words: dict[str, int], lengths: tuple[int, int], folder: Path, reranker: FlagReranker
) -> None:
    expected = by_hand(folder, PAIRS, *lengths)
    assert reranker.compute_score(PAIRS, **words) == pytest.approx(expected, abs=1e-5)
    assert FlagReranker(str(folder), **{"max_length": 48, **words}).compute_score(PAIRS) == pytest.approx(
        expected, abs=1e-5
    )


def test_instructions_stand_before_the_texts(folder: Path, reranker: FlagReranker) -> None:
    told = FlagReranker(
        str(folder), max_length=48, query_instruction_for_rerank="A", query_instruction_format="{}: {}",
        passage_instruction_for_rerank="B", passage_instruction_format="{} > {}",
    )  # fmt: skip
    expected = reranker.compute_score([(f"A: {query}", f"B > {passage}") for query, passage in PAIRS])
    assert told.compute_score(PAIRS) == expected


def test_one_pair_and_none(reranker: FlagReranker) -> None:
    found = reranker.compute_score(PAIRS[0])
    assert isinstance(found, list) and found == pytest.approx(reranker.compute_score(PAIRS)[:1], abs=1e-5)
    assert reranker.compute_score([]) == []


def test_threads_take_turns(folder: Path, reranker: FlagReranker) -> None:
    alone = [reranker.compute_score(PAIRS, max_length=length) for length in (20, 90)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: reranker.compute_score(PAIRS, max_length=(20, 90)[i % 2]), range(24)))
    assert all(scores == alone[i % 2] for i, scores in enumerate(found))


def test_devices_share_out_the_pairs(folder: Path, reranker: FlagReranker) -> None:
    expected = reranker.compute_score(PAIRS)
    with FlagReranker(str(folder), max_length=48, devices=["cpu", "cpu"]) as several:
        assert several.compute_score(PAIRS) == pytest.approx(expected, abs=1e-5)
        processes = several.pool["processes"]
        assert len(processes) == 2
    assert several.pool is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_length": 0}, "max_length: expected a whole number, at least 1"),
        ({"batch_size": -1}, "batch_size: expected a whole number"),
        ({"query_max_length": 46}, "a query of up to 46 tokens leaves no room for a passage in a max_length of 48"),
        ({"max_length": 3}, "leaves no room for a passage in a max_length of 3"),
        ({"surprise": 1}, "compute_score: takes no keyword surprise; it takes sentence_pairs, batch_size"),
    ],
)
def test_calls_that_are_refused(words: dict[str, Any], message: str, reranker: FlagReranker) -> None:
    with pytest.raises(UsageError, match=message):
        reranker.compute_score(PAIRS, **words)
    with pytest.raises(UsageError, match=r"pairs\[1\]\[1\]: expected a text, got NoneType"):
        reranker.compute_score([("a", "b"), ("c", None)])  # type: ignore[list-item]


def test_a_length_beyond_the_model_is_cut_and_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = FlagReranker(str(folder))
    found = [model.compute_score(PAIRS), model.compute_score(PAIRS, max_length=128)]
    assert found[0] == found[1] == pytest.approx(by_hand(folder, PAIRS, 96, 128), abs=1e-5)
    assert caplog.text.count("reads at most 128 tokens: cutting there, not at 512") == 1


def test_models_that_are_no_rerankers_are_refused(tiny_model_dir: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"not a trained reranker, it lacks a classifier \(XLMRobertaModel\)"):
        FlagReranker(str(tiny_model_dir))
    with pytest.raises(UsageError, match="a classifier of 2 labels; expected one"):
        FlagReranker(str(write_reranker(tmp_path / "two", 2)))
    with pytest.raises(UsageError, match="nowhere: cannot be loaded"):
        FlagReranker(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="takes no keyword use_bf16"):
        FlagReranker(str(folder), use_bf16=True)
    with pytest.raises(UsageError, match="format of query_instruction_for_rerank"):
        FlagReranker(str(folder), query_instruction_for_rerank="a", query_instruction_format="{}")


# ---- by the folder ----


def test_the_folder_decides_the_class(tiny_model_dir: Path, tiny_heads_dir: Path) -> None:
    assert type(FlagAutoModel.from_finetuned(str(tiny_model_dir))) is FlagModel
    assert type(FlagAutoModel.from_finetuned(str(tiny_heads_dir))) is BGEM3FlagModel
    kinds = {"encoder-only-base": FlagModel, "encoder-only-m3": BGEM3FlagModel}
    for name, kind in kinds.items():
        assert type(FlagAutoModel.from_finetuned(str(tiny_heads_dir), model_class=name)) is kind
    with pytest.raises(UsageError, match="'decoder-only-icl': expected 'encoder-only-base' or"):
        FlagAutoModel.from_finetuned(str(tiny_heads_dir), model_class="decoder-only-icl")


def test_keywords_go_on_to_the_class(tiny_model_dir: Path, tmp_path: Path) -> None:
    told = FlagAutoModel.from_finetuned(
        str(tiny_model_dir), normalize_embeddings=False, use_bf16=True, query_instruction_for_retrieval="find",
        devices="cpu", pooling_method="mean", query_instruction_format="{} > {}", truncate_dim=8, query_max_length=9,
        passage_instruction_for_retrieval="text: ",
    )  # fmt: skip
    plain = FlagModel(
        str(tiny_model_dir), normalize_embeddings=False, dtype="bf16", pooling_method="mean", truncate_dim=8
    )
    text = "the river and the sea"
    np.testing.assert_array_equal(told.encode_queries(text), plain.encode(f"find > {text}", max_length=9))
    np.testing.assert_array_equal(told.encode_corpus(text), plain.encode(f"text: {text}"))
    with pytest.raises(UsageError, match="takes no keyword surprise"):
        FlagAutoModel.from_finetuned(str(tiny_model_dir), surprise=1)
    instruct = tmp_path / "multilingual-e5-large-instruct"
    instruct.symlink_to(tiny_model_dir)
    (tmp_path / "run").mkdir()
    for path, form in ((instruct, "Instruct: {}\nQuery: {}"), (tiny_model_dir, "{}{}")):
        model = FlagAutoModel.from_finetuned(str(path), query_instruction_for_retrieval="find")
        assert model.query_instruction_format == form
        assert FlagAutoModel.from_finetuned(str(path)).query_instruction_format == "{}{}"


def test_rerankers_by_the_folder(folder: Path, reranker: FlagReranker) -> None:
    model = FlagAutoReranker.from_finetuned(str(folder), max_length=48)
    assert type(model) is FlagReranker
    assert model.compute_score(PAIRS) == reranker.compute_score(PAIRS)
    with pytest.raises(UsageError, match="'decoder-only-layerwise': expected 'encoder-only-base'; models of other"):
        FlagAutoReranker.from_finetuned(str(folder), model_class="decoder-only-layerwise")
    for kind in (FlagAutoModel, FlagAutoReranker):
        with pytest.raises(UsageError, match=rf"{kind.__name__}\.from_finetuned"):
            kind()


# ---- names ----


@pytest.mark.parametrize("name", ["FlagLLMModel", "FlagICLModel", "FlagLLMReranker", "EmbedderModelClass"])
def test_what_only_upstream_has_is_named_with_where_to_get_it(name: str) -> None:
    with pytest.raises(ImportError, match=f"has no {name}: it is a fork .* pip install FlagEmbedding==1.4.2") as found:
        exec(f"from FlagEmbedding import {name}")
    assert "\n" not in str(found.value)
    assert name not in dir(FlagEmbedding)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Surprise'"):
        FlagEmbedding.Surprise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Surprise'"):
        exec("from FlagEmbedding import Surprise")
    assert {"FlagReranker", "FlagAutoModel", "FlagAutoReranker"} <= set(dir(FlagEmbedding))


def test_asking_for_an_absent_name_loads_no_torch() -> None:
    code = (
        "import sys, FlagEmbedding\n"
        "try:\n    from FlagEmbedding import FlagLLMModel\n"
        "except ImportError:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
