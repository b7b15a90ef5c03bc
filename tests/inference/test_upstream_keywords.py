"""Keywords of upstream and of sentence-transformers act, or are refused in a line that says what to do."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.inference.precision import resolve_device
from FlagEmbedding.utils.errors import UsageError

TEXTS = ["강", "The Han river runs through Seoul.", "one TWO three"]
KINDS = [FlagModel, BGEM3FlagModel]


@pytest.fixture(scope="module")
def models(tiny_heads_dir: Path) -> dict[type[Any], Any]:
    return {kind: kind(str(tiny_heads_dir)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"show_progress_bar": True}, "takes no keyword show_progress_bar; give it to encode"),
        ({"torch_dtype": "bf16"}, "takes no keyword torch_dtype; give dtype="),
        ({"cache_folder": "x"}, "takes no keyword cache_folder; give cache_dir="),
        (
            {"surprise": 1},
            "takes no keyword surprise; it takes model_name_or_path, .*query_max_length",
        ),
        ({"device": "cpu", "devices": "cpu"}, "devices and device say the same thing"),
        ({"workers": 1, "num_workers": 1}, "workers and num_workers say the same thing"),
        ({"num_workers": -1}, "workers: expected a whole number, at least 0, got -1"),
        ({"devices": "gpu"}, "device 'gpu': no such kind; give 'cpu'"),
        ({"devices": "cuda:99"}, "device 'cuda:99': torch sees . GPU"),
        ({"devices": [98]}, "device 'cuda:98': torch sees"),
        ({"devices": "mps:7"}, "device 'mps:7': torch cannot use it here"),
    ],
)
def test_keywords_of_a_constructor_that_are_refused(
    kind: type[Any], words: dict[str, Any], message: str, tiny_heads_dir: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        kind(str(tiny_heads_dir), **words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_workers": 2}, "encode: takes no keyword num_workers; workers= is given when the model is made"),
        ({"device": "cpu"}, "encode: takes no keyword device; devices= is given when the model is made"),
        ({"normalize_embeddings": False}, "normalize_embeddings; give it when the model is made"),
        ({"convert_to_tensor": True}, "convert_to_tensor; give convert_to_numpy=False"),
        ({"surprise": True}, "takes no keyword surprise; it takes .*batch_size, max_length"),
    ],
)
def test_keywords_of_a_verb_that_are_refused(
    kind: type[Any], verb: str, words: dict[str, Any], message: str, models: dict[type[Any], Any]
) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(models[kind], verb)(TEXTS, **words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["encode_queries", "encode_corpus"])
@pytest.mark.parametrize("name", ["instruction", "instruction_format"])
def test_a_verb_with_an_instruction_of_its_own_takes_no_other(
    kind: type[Any], verb: str, name: str, models: dict[type[Any], Any]
) -> None:
    with pytest.raises(UsageError, match=f"{verb}: takes no keyword {name}; give it when the model is made, or call"):
        getattr(models[kind], verb)(TEXTS, **{name: "{}{}"})


def test_three_outputs_are_numpy_arrays(tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), convert_to_numpy=True)
    for verb in (model.encode, model.encode_queries, model.encode_corpus):
        assert isinstance(verb(TEXTS, convert_to_numpy=True)["dense_vecs"], np.ndarray)
        with pytest.raises(UsageError, match="BGEM3FlagModel gives numpy arrays"):
            verb(TEXTS, convert_to_numpy=False)
    with pytest.raises(UsageError, match="takes no keyword surprise; it takes sentence_pairs"):
        model.compute_score([("a", "b")], surprise=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
def test_a_bar_counts_the_texts_when_asked_for(
    kind: type[Any], verb: str, tiny_heads_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = kind(str(tiny_heads_dir), devices=["cpu", "cpu"])
    getattr(model, verb)(TEXTS)
    assert capsys.readouterr().err == ""
    getattr(model, verb)(TEXTS, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


def test_devices_in_every_spelling(tiny_heads_dir: Path) -> None:
    for words in ({"device": "cpu"}, {"devices": torch.device("cpu")}, {"devices": ("cpu",)}, {"device": None}):
        assert FlagModel(str(tiny_heads_dir), **words).encode("a").shape == (32,)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_model_in_a_with_block_leaves_no_process_behind(tiny_heads_dir: Path) -> None:
    with FlagModel(str(tiny_heads_dir), num_workers=1) as model:
        expected = model.encode(TEXTS)
        children = multiprocessing.active_children()
        assert children
    for child in children:
        child.join(20)
    assert not multiprocessing.active_children()
    np.testing.assert_array_equal(model.encode(TEXTS), expected)  # as upstream's, it starts them again
    model.stop_self_pool()


def test_lexical_weights_are_plain_numbers(tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), return_sparse=True)
    weights = model.encode(TEXTS)["lexical_weights"]
    assert json.loads(json.dumps(weights)) == weights
    assert {type(weight) for text in weights for weight in text.values()} == {float}
    scores = model.compute_score([(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])])
    assert json.loads(json.dumps(scores)) == scores


def test_weights_of_scores_may_be_an_array(tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir))
    pair = (TEXTS[0], TEXTS[1])
    weights = [0.4, 0.2, 0.4]
    found = model.compute_score(pair, weights_for_different_modes=np.array(weights))
    assert found == model.compute_score(pair, weights_for_different_modes=weights)
    with pytest.raises(UsageError, match="expected dense, sparse and colbert weights"):
        model.compute_score(pair, weights_for_different_modes=[])


def test_what_a_model_can_read_is_said_once(tiny_heads_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), devices=["cpu", "cpu"])
    for verb in (model.encode_queries, model.encode_corpus, model.encode):
        verb(TEXTS)
    model.compute_score((TEXTS[0], TEXTS[1]))
    assert caplog.text.count("reads at most 128 tokens: cutting there, not at 512") == 1
    long = "river " * 300
    np.testing.assert_array_equal(
        model.encode(long, max_length=300)["dense_vecs"], model.encode(long, max_length=128)["dense_vecs"]
    )
