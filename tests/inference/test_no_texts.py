"""What is no text is refused by every public way to encode, with its place; with an instruction it was its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.utils.errors import UsageError

Encode = Callable[[Any], Any]


@pytest.fixture(scope="module")
def ways(tiny_heads_dir: Path) -> dict[str, Encode]:
    told = {"query_instruction_for_retrieval": "query: ", "passage_instruction_for_retrieval": "passage: "}
    dense, m3 = (kind(str(tiny_heads_dir), **told) for kind in (FlagModel, BGEM3FlagModel))
    encoder = TextEncoder(EncoderArguments(str(tiny_heads_dir)))
    found: dict[str, Encode] = {"encode_texts": lambda texts: encode_texts(encoder, texts, 20, "query: ")}
    for name, model in (("dense", dense), ("m3", m3)):
        for verb in ("encode_queries", "encode_corpus", "encode"):
            found[f"{name} {verb}"] = getattr(model, verb)
    return found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"\[1\]: expected texts, found NoneType"),
        (["a", "b", float("nan")], r"\[2\]: expected texts, found float: nan"),
        ([5], r"\[0\]: expected texts, found int: 5"),
        (np.array([1.0, 2.0]), r"\[0\]: expected texts, found float64"),
        ([b"a"], r"\[0\]: expected texts, found bytes"),
        (["a", "\ud83d"], r"\[1\]: half of a surrogate pair at character 1"),
        ({"text": "a"}, "expected a text or a list of texts, found a dict"),
        (None, "expected a text or a list of texts, found None"),
        (b"a", "expected a text or a list of texts, found a bytes"),
    ],
)
def test_every_way_to_encode_names_what_is_no_text(ways: dict[str, Encode], texts: Any, message: str) -> None:
    for name, encode in ways.items():
        with pytest.raises(UsageError, match=message) as caught:
            encode(texts)
        assert "\n" not in str(caught.value), name


def test_pairs_are_two_texts_each(tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir))
    assert model.compute_score([("a", "b")])["dense"] == [model.compute_score(("a", "b"))["dense"]]
    for pairs, message in (
        ([("a", "b"), ("a", None)], r"sentence_pairs\[1\]\[1\]: expected texts, found NoneType"),
        ([("a", "b", "c")], r"sentence_pairs\[0\]: expected a query and a passage, found 3 texts"),
        ([("a", "\udc00")], r"sentence_pairs\[0\]\[1\]: half of a surrogate pair"),
    ):
        with pytest.raises(UsageError, match=message):
            model.compute_score(pairs)


def test_columns_and_arrays_of_texts_are_texts(ways: dict[str, Encode]) -> None:
    expected = ways["dense encode_queries"](["a", "b"])
    for texts in (("a", "b"), np.array(["a", "b"]), iter(["a", "b"])):
        assert np.array_equal(ways["dense encode_queries"](texts), expected)
