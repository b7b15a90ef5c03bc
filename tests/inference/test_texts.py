"""What is a text, a pair of texts, an instruction, a whole number; everything else is refused by name and position."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.inference.texts import after_instruction, as_pairs, as_texts
from FlagEmbedding.utils.errors import UsageError

TEXTS = ["강", "a river", ""]
INSTRUCTED = {"query_instruction_for_retrieval": "find: ", "passage_instruction_for_retrieval": "text: "}


class Word(str, enum.Enum):
    RIVER = "a river"


@pytest.fixture(scope="module")
def models(tiny_heads_dir: Path) -> list[Any]:
    return [FlagModel(str(tiny_heads_dir), **INSTRUCTED), BGEM3FlagModel(str(tiny_heads_dir), **INSTRUCTED)]


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        tuple(TEXTS),
        (text for text in TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pd.Series(TEXTS, index=[7, 1, 3]),
        pd.Series(TEXTS, dtype="string"),
        dict.fromkeys(TEXTS, 1).keys(),
        ["강", Word.RIVER, np.str_("")],
    ],
    ids=lambda given: type(given).__name__,
)
def test_texts_in_any_order_keeping_form(given: Any) -> None:
    if isinstance(given, type({}.keys())):  # a set by its type
        given = list(given)
    texts, single = as_texts(given)
    assert (texts, single) == (TEXTS, False)
    assert {type(text) for text in texts} == {str}


def test_one_text_is_a_vector_and_none_a_matrix_of_no_lines(models: list[Any]) -> None:
    dense, m3 = models
    for text in ("a river", np.str_("a river"), Word.RIVER):
        assert as_texts(text) == (["a river"], True)
        for verb in ("encode", "encode_queries", "encode_corpus"):
            assert getattr(dense, verb)(text).shape == (32,)
            assert getattr(m3, verb)(text)["dense_vecs"].shape == (32,)
    for empty in ([], (), np.array([], dtype=str), pd.Series([], dtype=object), iter(())):
        assert dense.encode_queries(empty).shape == (0, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", None], r"texts\[1\]: expected a text, got NoneType: None"),
        (["a", math.nan], r"texts\[1\]: expected a text, got float: nan"),
        (pd.Series(["a", None]), r"texts\[1\]: expected a text, got (NoneType|float)"),
        (["a", "b", 5], r"texts\[2\]: expected a text, got int: 5"),
        ([b"a"], r"texts\[0\]: expected a text, got bytes"),
        ([["a", "b"]], r"texts\[0\]: expected a text, got list"),
        ([{"text": "a" * 200}], r"texts\[0\]: expected a text, got dict: \{'text': 'aaa\S*…; leave it out"),
        (np.array([1.0, 2.0]), r"texts\[0\]: expected a text, got float64"),
        (np.array([["a", "b"]]), r"texts: expected 1 dimension\(s\), got 2 of a ndarray"),
        (np.array("a"), r"texts: expected 1 dimension\(s\), got 0 of a ndarray"),
        (pd.DataFrame({"text": ["a"]}), "texts: expected texts, got a DataFrame, whose items"),
        ({"text": "a"}, "texts: expected texts, got a dict, whose items are none in a fixed order; give a str or"),
        ({"a", "b"}, "texts: expected texts, got a set"),
        (b"a", "texts: expected texts, got a bytes"),
        (None, "texts: expected texts, got a NoneType: None; give a str or a list of str"),
        (3, "texts: expected texts, got a int: 3"),
        (["a", "b\ud83dc"], r"texts\[1\]: holds half a surrogate pair at character 2"),
        ("\udc80", "texts: holds half a surrogate pair at character 1"),
    ],
)
def test_what_is_no_text_is_refused_by_every_verb(given: Any, message: str, models: list[Any]) -> None:
    for model in models:
        for verb in (model.encode, model.encode_queries, model.encode_corpus):
            with pytest.raises(UsageError, match=message) as caught:
                verb(given)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_an_error_of_a_generator_is_its_own() -> None:
    def broken() -> Any:
        yield "a"
        raise TypeError("of the generator")

    with pytest.raises(TypeError, match="of the generator"):
        as_texts(broken())


@pytest.mark.parametrize(
    "given",
    [
        [("a", "b"), ("c", "d")],
        [["a", "b"], ["c", "d"]],
        np.array([["a", "b"], ["c", "d"]]),
        zip(["a", "c"], ["b", "d"], strict=True),
        (pair for pair in [("a", "b"), ("c", "d")]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_pairs(given: Any) -> None:
    assert as_pairs(given) == ([("a", "b"), ("c", "d")], False)


def test_a_single_pair(models: list[Any]) -> None:
    for pair in (("a", "b"), ["a", "b"], np.array(["a", "b"]), pd.Series(["a", "b"])):
        assert as_pairs(pair) == ([("a", "b")], True)
    scores = models[1].compute_score(("a", "b"))
    assert {type(score) for score in scores.values()} == {float}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "b", "c"], r"pairs\[0\]: expected two texts, \(query, passage\), got 3"),
        ([("a", "b"), ("a", "b", "c")], r"pairs\[1\]: expected two texts, \(query, passage\), got 3"),
        ([("a",)], r"pairs\[0\]: expected two texts, \(query, passage\), got 1"),
        (["a"], r"pairs\[0\]: expected two texts, \(query, passage\), got 1"),
        ([("a", "b"), "ab"], r"pairs\[1\]: expected texts, got a str"),
        ([("a", "b"), ("c", None)], r"pairs\[1\]\[1\]: expected a text, got NoneType"),
        ([(7, "b")], r"pairs\[0\]\[0\]: expected a text, got int"),
        ([{"query": "a", "passage": "b"}], r"pairs\[0\]: expected texts, got a dict"),
        ({"a": "b"}, "pairs: expected texts, got a dict, whose items are none in a fixed order; give a list of pairs"),
        (pd.DataFrame({"q": ["a"], "p": ["b"]}), "pairs: expected texts, got a DataFrame"),
        ("ab", "pairs: expected texts, got a str"),
        (None, "pairs: expected texts, got a NoneType"),
        ([None], r"pairs\[0\]: expected texts, got a NoneType"),
        ([("a", "\ud800")], r"pairs\[0\]\[1\]: holds half a surrogate pair"),
    ],
)
def test_what_is_no_pair_is_refused(given: Any, message: str, models: list[Any]) -> None:
    with pytest.raises(UsageError, match=message):
        models[1].compute_score(given)


def test_an_instruction_stands_before_every_text_as_the_format_says() -> None:
    assert after_instruction(["a {} b", ""], "find", "{}: {}") == ["find: a {} b", "find: "]
    assert after_instruction(["a"], "find", "Instruct: {0}\\nQuery: {1}") == ["Instruct: find\nQuery: a"]
    assert after_instruction(["a"], "find", None) == ["finda"]
    assert after_instruction(["a"], None, "{} > {}") == ["a"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{}", "expected two fields"),
        ("query: ", "expected two fields"),
        ("", "expected two fields"),
        ("{0} {0}", "expected two fields"),
        ("{1}", "expected two fields"),
        ("{}{}{}", "cannot be filled in"),
        ("{instruction}{text}", "cannot be filled in"),
        ("{}{} }", "cannot be filled in"),
        (None, "cannot be filled in"),
    ],
)
@pytest.mark.parametrize("role", ["query", "passage"])
def test_a_format_that_would_lose_the_text_is_refused(
    role: str, form: Any, message: str, tiny_heads_dir: Path, models: list[Any]
) -> None:
    words = {f"{role}_instruction_for_retrieval": "find", f"{role}_instruction_format": form}
    with pytest.raises(UsageError, match=f"format of {role}_instruction_for_retrieval: .*{message}"):
        FlagModel(str(tiny_heads_dir), **words)
    if form:
        for model in models:
            with pytest.raises(UsageError, match=message):
                model.encode("a", instruction="find", instruction_format=form)


def test_an_instruction_that_is_no_text_is_refused(tiny_heads_dir: Path, models: list[Any]) -> None:
    with pytest.raises(UsageError, match="query_instruction_for_retrieval: expected a str or None, got int: 5"):
        FlagModel(str(tiny_heads_dir), query_instruction_for_retrieval=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="instruction: expected a str or None, got list"):
        models[0].encode("a", instruction=["find"])


def test_a_format_without_an_instruction_says_that_it_does_nothing(
    tiny_heads_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FlagModel(str(tiny_heads_dir), query_instruction_format="{} > {}")
    assert "the format of query_instruction_for_retrieval has no effect" in caplog.text
    caplog.clear()
    FlagModel(str(tiny_heads_dir), query_instruction_for_retrieval="a", query_instruction_format="{} > {}")
    assert "has no effect" not in caplog.text


WHOLE = [0, -1, 2.5, "7", True, None]


@pytest.mark.parametrize("value", WHOLE)
@pytest.mark.parametrize("name", ["batch_size", "query_max_length", "passage_max_length", "truncate_dim"])
def test_numbers_of_the_constructor(name: str, value: Any, tiny_heads_dir: Path) -> None:
    if name == "truncate_dim" and value is None:
        return
    with pytest.raises(UsageError, match=f"{name}: expected a whole number, "):
        FlagModel(str(tiny_heads_dir), **{name: value})


@pytest.mark.parametrize("value", WHOLE[:-1])
@pytest.mark.parametrize("name", ["batch_size", "max_length"])
@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
def test_numbers_of_a_call(name: str, value: Any, verb: str, models: list[Any]) -> None:
    for model in models:
        with pytest.raises(UsageError, match=f"{name}: expected a whole number, at least 1, got {value!r}"):
            getattr(model, verb)(TEXTS, **{name: value})


@pytest.mark.parametrize("name", ["batch_size", "max_query_length", "max_passage_length"])
def test_numbers_of_compute_score(name: str, models: list[Any]) -> None:
    with pytest.raises(UsageError, match="expected a whole number, at least 1, got 0"):
        models[1].compute_score([("a", "b")], **{name: 0})


def test_a_cut_beyond_the_dimensions_is_refused(tiny_heads_dir: Path) -> None:
    assert FlagModel(str(tiny_heads_dir), truncate_dim=np.int64(32)).encode("a").shape == (32,)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="truncate_dim: expected a whole number, 1 to 32, got 33"):
        FlagModel(str(tiny_heads_dir), truncate_dim=33)
