"""Every keyword of the published constructors and their verbs acts.

With another value something must differ that a user can see: vectors, dtypes, products in a slab, processes, threads,
the warning, which of the devices worked, or the refusal of what contradicts the checkpoint.
"""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference.watch import TEXTS, Watch
from transformers import AutoTokenizer

from FlagEmbedding import BGEM3FlagModel, BGEM3ForInference, FlagModel
from FlagEmbedding.inference import base
from FlagEmbedding.inference.base import Embedder, upstream_dtype
from FlagEmbedding.utils.errors import UsageError


def plain(value: Any) -> Any:
    """Something that compares with ``==`` and says the type of what there was."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return type(value).__name__, str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


# ---- constructors ----

# Keyword: another value, what else is given in both runs, the part that must differ.
DENSE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "model_name_or_path": ("{other}", {}, "encode"),
    "normalize_embeddings": (False, {}, "encode"),
    "use_bf16": (True, {}, "dtype"),
    "query_instruction_for_retrieval": ("find: ", {}, "encode_queries"),
    "query_instruction_format": ("{} > {}", {"query_instruction_for_retrieval": "find"}, "encode_queries"),
    "devices": (["cpu", "cpu"], {}, "workers"),
    "pooling_method": ("mean", {}, "encode"),
    "trust_remote_code": (True, {"model_name_or_path": "{loud}"}, "encode"),
    "cache_dir": ("{hub_b}", {"model_name_or_path": "org/tiny", "cache_dir": "{hub_a}"}, "encode"),
    "batch_size": (1, {"passage_max_length": 20}, "slabs"),
    "query_max_length": (6, {}, "encode_queries"),
    "passage_max_length": (6, {}, "encode_corpus"),
    "truncate_dim": (8, {}, "encode"),
    "passage_instruction_for_retrieval": ("text: ", {}, "encode_corpus"),
    "passage_instruction_format": ("{} > {}", {"passage_instruction_for_retrieval": "text"}, "encode_corpus"),
    "dtype": ("bf16", {}, "dtype"),
    "engine": ("padded", {}, "padded"),
    "moe": ("output", {}, "refused"),
    "workers": (1, {}, "processes"),
    "num_workers": (1, {}, "processes"),
    "device": ("nowhere", {}, "refused"),
}
ONLY_DENSE = {"convert_to_numpy": (False, {}, "encode")}
ONLY_M3 = {
    "return_dense": (False, {"return_sparse": True}, "encode"),
    "return_sparse": (True, {}, "encode"),
    "return_colbert_vecs": (True, {}, "encode"),
    "colbert_dim": (8, {}, "refused"),
    "convert_to_numpy": (False, {}, "refused"),
}
EXEMPT = {"use_fp16": "fp16 is for GPUs; test_upstreams_switches_of_precision"}
# On the class of the other outputs only what goes by its own code is walked again.
AGAIN = (
    "model_name_or_path", "query_instruction_for_retrieval", "query_instruction_format", "batch_size",
    "query_max_length", "passage_max_length", "truncate_dim", "passage_instruction_for_retrieval",
    "passage_instruction_format", "normalize_embeddings",
)  # fmt: skip
WALK = [(FlagModel, name, case) for name, case in (DENSE | ONLY_DENSE).items()]
WALK += [(BGEM3FlagModel, name, case) for name, case in ({n: DENSE[n] for n in AGAIN} | ONLY_M3).items()]


def observe_model(kind: type[Embedder], keywords: dict[str, Any], places: dict[str, Path], close: list[Any]) -> Any:
    keywords = {"model_name_or_path": "{heads}", **keywords}
    keywords = {key: value.format(**places) if key in PATHS else value for key, value in keywords.items()}
    verbs: dict[str, Callable[..., Any]]
    parts: dict[str, Any] = {"refused": False}
    try:
        model: Any = kind(**keywords)
    except UsageError:
        return {"refused": True}
    close.extend(model._encoders)
    watch = Watch(*(each.encoder for each in model._encoders))
    verbs = {name: getattr(model, name) for name in ("encode", "encode_queries", "encode_corpus")}
    parts |= {name: [plain(verb(TEXTS)), plain(verb(TEXTS[1])), plain(verb([]))] for name, verb in verbs.items()}
    parts |= watch.seen() | {"dtype": next(model.model.parameters()).dtype}
    for encoder in model._encoders:
        encoder.pool.close()
    for child in multiprocessing.active_children():
        child.join(20)
    return parts


PATHS = ("model_name_or_path", "cache_dir")


def test_no_keyword_is_left_out() -> None:
    published = set(inspect.signature(Embedder.__init__).parameters) - {"self", "others"}
    assert published == set(DENSE) | {"colbert_dim"} | set(EXEMPT)
    for kind, own in ((FlagModel, ONLY_DENSE), (BGEM3FlagModel, ONLY_M3)):
        parameters = inspect.signature(kind.__init__).parameters.values()
        named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert named == set(own) - {"colbert_dim"}


@pytest.mark.parametrize(("kind", "name", "case"), WALK, ids=[f"{k.__name__}-{n}" for k, n, _ in WALK])
def test_every_keyword_acts(
    kind: type[Embedder], name: str, case: tuple[Any, dict[str, Any], str], places: dict[str, Path],
    close: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(base, "WINDOW", 2)  # several windows, which devices share out
    value, given, part = case
    without = observe_model(kind, given, places, close)
    with_it = observe_model(kind, {**given, name: value}, places, close)
    assert without.get(part) != with_it.get(part)


def test_upstreams_switches_of_precision() -> None:
    """The default on a GPU is fp16, on a CPU fp32; bf16 holds on both."""
    assert [upstream_dtype(asked, False, "cuda:1") for asked in (None, True, False)] == ["fp16", "fp16", "fp32"]
    assert [upstream_dtype(asked, False, "cpu") for asked in (None, True, False)] == ["fp32"] * 3
    assert [upstream_dtype(asked, True, "cuda:0") for asked in (None, True, False)] == ["bf16"] * 3


# ---- verbs ----

VERBS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("max_length", {"max_length": 6}, {}),
    ("batch_size", {"batch_size": 1}, {"max_length": 20}),
    ("instruction", {"instruction": "find: "}, {}),
    ("instruction_format", {"instruction_format": "{} > {}"}, {"instruction": "find"}),
]


@pytest.mark.parametrize("kind", [FlagModel, BGEM3FlagModel])
@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize(("name", "words", "given"), VERBS, ids=[name for name, _, _ in VERBS])
def test_every_keyword_of_a_verb_acts(
    kind: type[Any], verb: str, name: str, words: dict[str, Any], given: dict[str, Any], tiny_heads_dir: Path
) -> None:
    if name not in inspect.signature(getattr(kind, verb)).parameters:
        assert verb != "encode"
        return
    model = kind(str(tiny_heads_dir), query_max_length=30, passage_max_length=30)
    seen = []
    for keywords in (given, given | words):
        watch = Watch(model.model)
        seen.append((plain(getattr(model, verb)(TEXTS, **keywords)), sorted(watch.slabs)))
    if name != "batch_size":  # on which no result depends but by rounding
        assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
@pytest.mark.parametrize("output", ["dense", "sparse", "colbert_vecs"])
def test_every_output_is_asked_for_by_its_own_name(verb: str, output: str, tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), return_sparse=True)  # a word of the call goes before the constructor's
    outputs = {"dense": "dense_vecs", "sparse": "lexical_weights", "colbert_vecs": "colbert_vecs"}
    asked = {f"return_{name}": name == output for name in outputs}
    found = getattr(model, verb)(TEXTS, **asked)
    assert [name for name, value in found.items() if value is not None] == [outputs[output]]
    assert len(found[outputs[output]]) == len(TEXTS)


@pytest.mark.parametrize("verb", ["encode", "encode_queries", "encode_corpus"])
def test_a_call_decides_the_type_of_its_result(verb: str, tiny_heads_dir: Path) -> None:
    for default in (True, False):
        words = {"convert_to_numpy": default, "dtype": "bf16", "normalize_embeddings": default}
        model = FlagModel(str(tiny_heads_dir), **words)
        for asked in (True, False, None):
            found = getattr(model, verb)(TEXTS, convert_to_numpy=asked)
            wanted = default if asked is None else asked
            assert isinstance(found, np.ndarray if wanted else torch.Tensor)
            assert found.dtype == (np.float32 if wanted else torch.float32)


PAIRS = [(TEXTS[1], TEXTS[4]), (TEXTS[3], TEXTS[1]), (TEXTS[4], TEXTS[3])]


@pytest.mark.parametrize(
    "words",
    [
        {"max_query_length": 6},
        {"max_passage_length": 6},
        {"weights_for_different_modes": [1.0, 0.0, 0.0]},
        {"weights_for_different_modes": [0.0, 1.0, 0.0]},
        {"weights_for_different_modes": [0.0, 0.0, 1.0]},
    ],
)
def test_every_keyword_of_compute_score_acts(words: dict[str, Any], tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), query_max_length=30, passage_max_length=40)
    plain_scores, scores = model.compute_score(PAIRS), model.compute_score(PAIRS, **words)
    assert plain_scores != scores
    if "weights_for_different_modes" in words:
        kind = ("dense", "sparse", "colbert")[words["weights_for_different_modes"].index(1.0)]
        assert scores["colbert+sparse+dense"] == pytest.approx(scores[kind], abs=1e-6)
        both = {"dense": scores["dense"], "sparse": scores["sparse"], "colbert": [0.0] * len(PAIRS)}[kind]
        assert scores["sparse+dense"] == pytest.approx(both, abs=1e-6)
        return
    # What is cut is the query alone, or the passage alone, at the lengths of the constructor otherwise.
    lengths = {"query_max_length": 30, "passage_max_length": 40}
    lengths |= {f"{key.split('_')[1]}_max_length": value for key, value in words.items()}
    told = BGEM3FlagModel(str(tiny_heads_dir), **lengths).compute_score(PAIRS)
    assert scores == told


def test_a_batch_of_pairs_is_cut_by_its_size(tiny_heads_dir: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir), query_max_length=20, passage_max_length=20)
    slabs = []
    for size in (256, 1):
        watch = Watch(model.model)
        model.compute_score(PAIRS, batch_size=size)
        slabs.append(len(watch.slabs))
    assert slabs[0] == 2 and slabs[1] > 2


# ---- the published module ----

MODULE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "model_name": ("{other}", {"unified_finetuning": False}, "output"),
    "normlized": (False, {}, "output"),
    "sentence_pooling_method": ("mean", {}, "output"),
    "unified_finetuning": (False, {}, "heads"),
    "colbert_dim": (8, {}, "refused"),
    "dtype": ("bf16", {}, "output"),
    "device": ("meta", {}, "refused"),
    "engine": ("padded", {}, "padded"),
    "cache_dir": ("{hub_b}", {"model_name": "org/tiny", "cache_dir": "{hub_a}", "unified_finetuning": False}, "output"),
}


@pytest.mark.parametrize("name", [*MODULE, None])
def test_every_keyword_of_the_published_module_acts(name: str | None, places: dict[str, Path]) -> None:
    if name is None:
        assert set(inspect.signature(BGEM3ForInference.__init__).parameters) - {"self"} == set(MODULE)
        return
    value, given, part = MODULE[name]
    tokenizer = AutoTokenizer.from_pretrained(places["heads"])
    features = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    seen: list[dict[str, Any]] = []
    for keywords in (given, {**given, name: value}):
        words: dict[str, Any] = {"model_name": "{heads}"} | keywords
        words = {k: v.format(**places) if k in ("model_name", "cache_dir") else v for k, v in words.items()}
        try:
            module = BGEM3ForInference(**words)
            watch = Watch(module.encoder)
            output = module(features, return_sparse=module.has_heads, return_colbert=module.has_heads)
            seen.append({"output": plain(output), "heads": module.has_heads, **watch.seen()})
        except (UsageError, NotImplementedError, RuntimeError):  # the last two: torch, of a device without memory
            seen.append({"refused": True})
    assert seen[0].get(part) != seen[1].get(part)
