"""FlagModel and BGEM3FlagModel against the plain transformers forward and the formulas written out."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from inference.reference import Reference

import FlagEmbedding
from FlagEmbedding import BGEM3FlagModel, BGEM3ForInference, FlagModel
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.base import target_devices
from FlagEmbedding.inference.scores import lexical_weights
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.slabs import FILL
from FlagEmbedding.modeling.tokens import TokenBatch, special_ids
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

TEXTS = [
    "강",
    "The Han river runs through Seoul and reaches the Yellow Sea.",
    "रود",
    "گنگا and the river and the river and the sea, " * 4,
    "",
    "one two three",
]


@pytest.fixture(scope="module")
def reference(tiny_heads_dir: Path) -> Reference:
    return Reference(tiny_heads_dir)


@pytest.fixture(scope="module")
def m3(tiny_heads_dir: Path) -> BGEM3FlagModel:
    return BGEM3FlagModel(str(tiny_heads_dir))


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dense_vectors(tiny_heads_dir: Path, reference: Reference, engine: str, pooling: str) -> None:
    model = FlagModel(str(tiny_heads_dir), pooling_method=pooling, engine=engine)
    found = model.encode(TEXTS, batch_size=2, max_length=40)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    expected = np.stack([reference.dense(text, pooling, 40) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_text_many_texts_no_text_and_tensors(tiny_heads_dir: Path) -> None:
    model = FlagModel(str(tiny_heads_dir))
    many = model.encode(TEXTS)
    assert model.encode(TEXTS[1]).shape == (32,)
    np.testing.assert_allclose(model.encode(TEXTS[1]), many[1], atol=1e-6)
    assert model.encode([]).shape == (0, 32)
    tensors = model.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(tensors.numpy(), many)
    with pytest.raises(UsageError, match=r"texts\[1\]: expected a text, got int"):
        model.encode(["a", 3])


def test_more_texts_than_a_window_keep_their_order(tiny_heads_dir: Path) -> None:
    texts = [f"{i} {'x ' * (i % 7)}" for i in range(2100)]
    model = FlagModel(str(tiny_heads_dir))
    found = model.encode(texts)
    assert found.shape == (2100, 32)
    for i in (0, 2047, 2048, 2099):
        np.testing.assert_allclose(found[i], model.encode(texts[i]), atol=1e-5)
    two = FlagModel(str(tiny_heads_dir), devices=["cpu", "cpu"])
    np.testing.assert_allclose(two.encode(texts), found, atol=1e-6)


def test_instructions_go_before_the_text(tiny_heads_dir: Path) -> None:
    plain = FlagModel(str(tiny_heads_dir))
    told = FlagModel(
        str(tiny_heads_dir),
        query_instruction_for_retrieval="query: ",
        passage_instruction_for_retrieval="passage",
        passage_instruction_format="{}:\\n{}",
    )
    np.testing.assert_array_equal(told.encode_queries(TEXTS), plain.encode([f"query: {text}" for text in TEXTS]))
    np.testing.assert_array_equal(told.encode_corpus("a b"), plain.encode("passage:\na b"))
    np.testing.assert_array_equal(told.encode(TEXTS), plain.encode(TEXTS))


def test_instructions_of_the_three_outputs(tiny_heads_dir: Path, m3: BGEM3FlagModel) -> None:
    told = BGEM3FlagModel(
        str(tiny_heads_dir),
        query_instruction_for_retrieval="query",
        query_instruction_format="{}: {}",
        passage_instruction_for_retrieval="passage",
        passage_instruction_format="{} > {}",
    )
    for found, prefix in ((told.encode_queries(TEXTS), "query: "), (told.encode_corpus(TEXTS), "passage > ")):
        expected = m3.encode([prefix + text for text in TEXTS])
        np.testing.assert_array_equal(found["dense_vecs"], expected["dense_vecs"])


def test_lengths_of_queries_and_passages(tiny_heads_dir: Path) -> None:
    model = FlagModel(str(tiny_heads_dir), query_max_length=8, passage_max_length=12)
    np.testing.assert_array_equal(model.encode_queries(TEXTS), model.encode(TEXTS, max_length=8))
    np.testing.assert_array_equal(model.encode_corpus(TEXTS), model.encode(TEXTS, max_length=12))
    assert np.abs(model.encode_queries(TEXTS[3]) - model.encode_corpus(TEXTS[3])).max() > 1e-3


def test_shorter_and_unnormalized_vectors(tiny_heads_dir: Path) -> None:
    whole = FlagModel(str(tiny_heads_dir)).encode(TEXTS)
    short = FlagModel(str(tiny_heads_dir), truncate_dim=8).encode(TEXTS)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    raw = FlagModel(str(tiny_heads_dir), normalize_embeddings=False).encode(TEXTS)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "bf16"}, torch.bfloat16),
        ({"use_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
        ({"use_fp16": True}, torch.float32),  # as upstream: fp16 is for GPUs
        ({"use_fp16": True, "dtype": "bf16"}, torch.bfloat16),
    ],
)
def test_the_dtype_holds_on_a_cpu(tiny_heads_dir: Path, settings: dict[str, Any], expected: torch.dtype) -> None:
    model = FlagModel(str(tiny_heads_dir), devices="cpu", **settings)
    assert next(model.model.parameters()).dtype is expected
    exact = FlagModel(str(tiny_heads_dir), devices="cpu").encode(TEXTS)
    found = model.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)  # normalized in float32
    difference = np.abs(found - exact).max()
    assert difference < 0.1
    assert (difference > 1e-4) == (expected is torch.bfloat16)


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_bf16_rows_beside_the_filling(tiny_heads_dir: Path, engine: Literal["packed", "padded"]) -> None:
    """In bf16 a slab is filled up to a round number of tokens; every kind of row comes back, and no row more."""
    loaded = TextEncoder(
        EncoderArguments(encoder=str(tiny_heads_dir), dtype="bf16", heads=True, engine=engine, device="cpu")
    )
    rows = [torch.randint(4, 90, (n,)).tolist() for n in (30, 21, 9, 9, 3, 2)]
    tokens = TokenBatch.from_lists(rows)
    assert len(tokens.ids) % FILL
    kinds = {"dense", "sparse", "colbert"}
    with torch.inference_mode():
        alone = [loaded.encoder.encode([TokenBatch.from_lists([row])], [kinds])[0] for row in rows]
    found = loaded.represent(tokens, kinds)
    for name in ("dense", "token_weights", "colbert"):
        ours, expected = getattr(found, name).float(), torch.cat([getattr(each, name) for each in alone]).float()
        if name != "token_weights":
            expected = torch.nn.functional.normalize(expected, dim=-1)
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.03)


def test_experts_need_no_flag(tiny_moe_dir: Path) -> None:
    found = FlagModel(str(tiny_moe_dir)).encode(TEXTS)
    np.testing.assert_array_equal(FlagModel(str(tiny_moe_dir), moe="intermediate").encode(TEXTS), found)
    np.testing.assert_allclose(FlagModel(str(tiny_moe_dir), engine="padded").encode(TEXTS), found, atol=1e-5)
    with pytest.raises(UsageError, match="--moe output"):
        FlagModel(str(tiny_moe_dir), moe="output")


def test_pooling_comes_from_the_checkpoint_unless_given(tiny_model_dir: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(tiny_model_dir, folder := tmp_path / "mean")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert FlagModel(str(folder)).pooling_method == "mean"
    assert FlagModel(str(folder), pooling_method="cls").pooling_method == "cls"
    assert FlagModel(str(tiny_model_dir)).pooling_method == "cls"


def test_three_outputs(m3: BGEM3FlagModel, reference: Reference) -> None:
    found = m3.encode(TEXTS, batch_size=4, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    assert list(found) == ["dense_vecs", "lexical_weights", "colbert_vecs"]
    np.testing.assert_allclose(found["dense_vecs"], np.stack([reference.dense(text) for text in TEXTS]), atol=1e-5)
    for text, weights, vectors in zip(TEXTS, found["lexical_weights"], found["colbert_vecs"], strict=True):
        expected = reference.lexical(text)
        assert list(weights) == list(expected)
        np.testing.assert_allclose(list(weights.values()), list(expected.values()), atol=1e-5)
        np.testing.assert_allclose(vectors, reference.colbert(text), atol=1e-5)
    assert any(found["lexical_weights"])


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_outputs_do_not_depend_on_the_engine_or_the_neighbors(
    tiny_heads_dir: Path, m3: BGEM3FlagModel, engine: str
) -> None:
    everything = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    model = BGEM3FlagModel(str(tiny_heads_dir), engine=engine, **everything)
    together = model.encode_corpus(TEXTS, batch_size=1, max_length=64)
    for i, text in enumerate(TEXTS):
        alone = m3.encode(text, max_length=64, **everything)
        np.testing.assert_allclose(alone["dense_vecs"], together["dense_vecs"][i], atol=1e-5)
        np.testing.assert_allclose(alone["colbert_vecs"], together["colbert_vecs"][i], atol=1e-5)
        assert alone["lexical_weights"].keys() == together["lexical_weights"][i].keys()


def test_only_what_was_asked_for(m3: BGEM3FlagModel) -> None:
    found = m3.encode(TEXTS)
    assert found["lexical_weights"] is None
    assert found["colbert_vecs"] is None
    found = m3.encode_queries("a b", return_dense=False, return_sparse=True)
    assert found["dense_vecs"] is None
    assert isinstance(found["lexical_weights"], dict)
    with pytest.raises(UsageError, match="nothing to encode"):
        m3.encode(TEXTS, return_dense=False)


def test_scores_of_pairs(m3: BGEM3FlagModel, reference: Reference) -> None:
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[5], TEXTS[3]), (TEXTS[1], TEXTS[1])]
    found = m3.compute_score(pairs, weights_for_different_modes=[0.4, 0.2, 0.4])
    assert isinstance(found, dict)
    assert set(found) == {"colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"}
    for i, (query, passage) in enumerate(pairs):
        dense = float(reference.dense(query) @ reference.dense(passage))
        q, p = reference.lexical(query), reference.lexical(passage)
        sparse = sum(q[token] * p[token] for token in q.keys() & p.keys())
        colbert = float((reference.colbert(query) @ reference.colbert(passage).T).max(axis=1).mean())
        assert found["dense"][i] == pytest.approx(dense, abs=1e-5)
        assert found["sparse"][i] == pytest.approx(sparse, abs=1e-5)
        assert found["colbert"][i] == pytest.approx(colbert, abs=1e-5)
        assert found["sparse+dense"][i] == pytest.approx((0.4 * dense + 0.2 * sparse) / 0.6, abs=1e-5)
        hybrid = 0.4 * dense + 0.2 * sparse + 0.4 * colbert
        assert found["colbert+sparse+dense"][i] == pytest.approx(hybrid, abs=1e-5)
    single = m3.compute_score(pairs[0], weights_for_different_modes=[0.4, 0.2, 0.4])
    assert isinstance(single, dict)
    assert single["dense"] == pytest.approx(found["dense"][0], abs=1e-6)
    assert m3.compute_score([]) == []
    with pytest.raises(UsageError, match="dense, sparse and colbert"):
        m3.compute_score(pairs, weights_for_different_modes=[1.0])


def test_scores_between_representations(m3: BGEM3FlagModel) -> None:
    one, other = {"5": 2.0, "7": 1.0}, {"7": 3.0, "9": 1.0}
    assert m3.compute_lexical_matching_score(one, other) == 3.0
    np.testing.assert_array_equal(m3.compute_lexical_matching_score([one, other], [other]), [[3.0], [10.0]])
    with pytest.raises(ValueError, match="two dictionaries"):
        m3.compute_lexical_matching_score(one, [other])
    q, p = np.eye(2, 3, dtype=np.float32), np.array([[0.5, 0.2, 0], [0.1, 0.9, 0]], dtype=np.float32)
    assert m3.colbert_score(q, p).item() == pytest.approx((0.5 + 0.9) / 2)


def test_ids_become_tokens(m3: BGEM3FlagModel, reference: Reference) -> None:
    weights = m3.encode([TEXTS[1], TEXTS[5]], return_sparse=True)["lexical_weights"]
    named = m3.convert_id_to_token(weights)
    assert [list(row.values()) for row in named] == [list(row.values()) for row in weights]
    first = next(iter(weights[0]))
    assert next(iter(named[0])) == reference.tokenizer.decode([int(first)])
    assert m3.convert_id_to_token(weights[0]) == named[0]


def test_a_checkpoint_without_heads_gives_dense_vectors_only(tiny_model_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_model_dir))
    assert model.encode("text")["dense_vecs"].shape == (32,)
    with pytest.raises(UsageError, match="no sparse and colbert heads"):
        model.encode("text", return_sparse=True)
    with pytest.raises(UsageError, match="no sparse and colbert heads"):
        model.compute_score(("a", "b"))


def test_the_published_module(tiny_heads_dir: Path, reference: Reference) -> None:
    module = BGEM3ForInference(model_name=str(tiny_heads_dir))
    features = reference.tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    output = module(text_input=features, return_dense=True, return_sparse=True, return_colbert=True)
    length = features["input_ids"].shape[1]
    assert output["sparse_vecs"].shape == (6, length, 1)
    assert output["colbert_vecs"].shape == (6, length - 1, 16)
    wide = module(text_input=features, return_dense=False, return_sparse=True, return_sparse_embedding=True)
    assert list(wide) == ["sparse_vecs"]
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(output["dense_vecs"][i], reference.dense(text, max_length=64), atol=1e-5)
        if len(reference.states(text)[0]) > 64:
            continue
        vectors = reference.colbert(text)
        np.testing.assert_allclose(output["colbert_vecs"][i, : len(vectors)], vectors, atol=1e-5)
        assert not output["colbert_vecs"][i, len(vectors) :].any()
        expected = np.zeros(wide["sparse_vecs"].shape[1], dtype=np.float32)
        for token, weight in reference.lexical(text).items():
            expected[int(token)] = weight
        np.testing.assert_allclose(wide["sparse_vecs"][i], expected, atol=1e-5)
    with pytest.raises(UsageError, match="at least one"):
        module(text_input=features, return_dense=False)


def test_devices() -> None:
    assert target_devices("cpu") == ["cpu"]
    assert target_devices(1) == ["cuda:1"]
    assert target_devices([0, 2]) == ["cuda:0", "cuda:2"]
    if not torch.cuda.is_available():
        assert target_devices(None) == ["cpu"]
    with pytest.raises(UsageError, match="empty list"):
        target_devices([])


@pytest.mark.parametrize("fixture", ["tiny_heads_dir", "tiny_moe_dir"])
def test_models_can_be_copied_and_stored(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To hand one to another process: options alone, and the same bits where it wakes."""
    folder = request.getfixturevalue(fixture)
    monkeypatch.chdir(folder.parent)
    model = FlagModel(folder.name, batch_size=3, query_instruction_for_retrieval="find: ", truncate_dim=8)
    expected = model.encode(TEXTS), model.encode_queries(TEXTS)
    stored = pickle.dumps(model)
    assert len(stored) < 8_000
    monkeypatch.chdir("/")
    for other in (copy.deepcopy(model), pickle.loads(stored)):
        for found, right in zip((other.encode(TEXTS), other.encode_queries(TEXTS)), expected, strict=True):
            np.testing.assert_array_equal(found, right)
        assert (other.batch_size, other.model is model.model) == (3, False)
    np.testing.assert_array_equal(model.encode(TEXTS), expected[0])


def test_a_copy_of_a_changed_model_says_what_it_has(
    tiny_heads_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("FlagEmbedding"), "propagate", True)
    model = FlagModel(str(tiny_heads_dir))
    model.encode(TEXTS)
    copy.deepcopy(model)
    assert not [record for record in caplog.records if "weights were changed" in record.getMessage()]
    with torch.no_grad():
        next(iter(model.model.parameters())).add_(1.0)
    copy.deepcopy(model)
    assert [record for record in caplog.records if "weights were changed" in record.getMessage()]


def test_arguments_that_cannot_be_meant(tiny_heads_dir: Path) -> None:
    for name in (None, 5):
        with pytest.raises(UsageError, match="model_name_or_path: expected a hub id or a folder"):
            FlagModel(name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="query_instruction_for_retrieval: holds half a surrogate pair at character 2"):
        FlagModel(str(tiny_heads_dir), query_instruction_for_retrieval="a\ud800")
    model = BGEM3FlagModel(str(tiny_heads_dir))
    for weights in ("abc", [1, float("nan"), 1], [1, 2], [None, 1, 1], [0, 0, 0]):
        with pytest.raises(UsageError, match="expected dense, sparse and colbert weights"):
            model.compute_score([("a", "b")], weights_for_different_modes=weights)  # type: ignore[arg-type]


def test_nothing_to_encode(tiny_heads_dir: Path) -> None:
    """No text, an empty text, one of blanks: empty results of the usual types, and vectors like any other."""
    model, m3 = FlagModel(str(tiny_heads_dir), truncate_dim=8), BGEM3FlagModel(str(tiny_heads_dir))
    everything = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    for empty in (model.encode([]), model.encode_queries([]), model.encode_corpus([])):
        assert (empty.shape, empty.dtype) == ((0, 8), np.float32)
    assert model.encode([], convert_to_numpy=False).shape == (0, 8)
    found = m3.encode([], **everything)
    assert found["dense_vecs"].shape == (0, 32) and found["lexical_weights"] == found["colbert_vecs"] == []
    for text in ("", " "):
        assert np.linalg.norm(model.encode(text)) == pytest.approx(1, abs=1e-5)
        found = m3.encode(text, **everything)
        assert np.isfinite(found["colbert_vecs"]).all()
        assert found["colbert_vecs"].shape == (len(m3.tokenizer(text)["input_ids"]) - 1, 16)
    assert m3.encode("", **everything)["lexical_weights"] == {}  # special tokens alone


def test_pairs_beyond_a_window_keep_their_order(m3: BGEM3FlagModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(TEXTS[i % 6], TEXTS[(i * i + 1) % 6]) for i in range(7)]
    expected = m3.compute_score(pairs)
    for module in ("base", "embedder"):
        monkeypatch.setattr(f"FlagEmbedding.inference.{module}.WINDOW", 3)
    found = m3.compute_score(pairs)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-5)


def test_special_tokens_have_no_lexical_weight_but_the_mask_has(m3: BGEM3FlagModel, reference: Reference) -> None:
    text = "a <mask> b <unk> c <s> </s>"
    weights = m3.encode(text, return_sparse=True)["lexical_weights"]
    expected = reference.lexical(text)
    assert weights.keys() == expected.keys()
    ids = {name: str(m3.tokenizer.convert_tokens_to_ids(name)) for name in ("<mask>", "<unk>", "<s>", "</s>")}
    assert not weights.keys() & {ids["<unk>"], ids["<s>"], ids["</s>"]}
    # The head of this checkpoint gives the mask a weight or not; the rule for it is what is looked at.
    tokens = TokenBatch.from_lists([[0, int(ids["<mask>"]), int(ids["<unk>"]), 9, 9, 2]])
    made = Representations(tokens, token_weights=torch.tensor([1.0, 2.0, 3.0, 0.5, 0.75, 4.0]))
    assert lexical_weights(made, special_ids(m3.tokenizer)) == [{ids["<mask>"]: 2.0, "9": 0.75}]


def test_public_names() -> None:
    assert {"FlagModel", "BGEM3FlagModel", "BGEM3ForInference"} <= set(dir(FlagEmbedding))
