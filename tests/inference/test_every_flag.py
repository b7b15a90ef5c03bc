"""Every flag of EncoderArguments acts: vectors, dtypes, slabs, processes, the warning or the refusal differ."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.watch import TEXTS, Watch
from options_walk import Case, assert_acts, assert_complete

from FlagEmbedding import FlagModel
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.utils.cli import parse
from FlagEmbedding.utils.errors import UsageError

VECTORS = ("vectors",)
FLAGS = {
    "encoder": Case("--encoder {other}", only=("vectors", "described")),
    "pooling_method": Case("--pooling_method mean", only=("vectors", "described")),
    "normalize_embeddings": Case("--normalize_embeddings False", only=("vectors", "described")),
    "fp16": Case("--fp16", only=("log",)),
    "dtype": Case("--dtype bf16", only=("vectors", "described")),
    "moe": Case("--moe intermediate", only=("refused",)),
    "engine": Case("--engine padded", only=("padded", "described")),
    "batch_size": Case("--batch_size 1", only=("slabs",)),
    "truncate_dim": Case("--truncate_dim 8", only=("vectors", "described")),
    "workers": Case("--workers 1", only=("processes",)),
    "cache_dir": Case("--cache_dir {hub_b}", given="--encoder org/tiny --cache_dir {hub_a}", only=VECTORS),
    "trust_remote_code": Case("--trust_remote_code", given="--encoder {loud}", only=VECTORS),
    "trust_remote_code in a worker": Case(
        "--trust_remote_code", given="--encoder {loud} --workers 1", only=("vectors", "slabs")
    ),
}


def observe_flags(
    words: list[str], places: dict[str, Path], close: list[Any], caplog: pytest.LogCaptureFixture
) -> dict[str, Any]:
    caplog.clear()
    parts = {"vectors": None, "described": None, "refused": False, "slabs": [], "workers": set(), "padded": 0}
    parts |= {"processes": 0, "log": ""}
    (options,) = parse([EncoderArguments], ["--encoder", str(places["model"]), *fill(words, places)], "test")
    try:
        encoder = TextEncoder(options)
    except UsageError:
        return parts | {"refused": True}
    close.append(encoder)
    watch = Watch(encoder.encoder)
    parts["vectors"] = encode_texts(encoder, TEXTS, 20).tolist()
    parts |= watch.seen() | {"described": encoder.describe(), "log": caplog.text}
    encoder.pool.close()
    for child in multiprocessing.active_children():
        child.join(20)
    return parts


def fill(words: list[str], places: dict[str, Path]) -> list[str]:
    return [word.format(**places) for word in words]


def test_no_flag_is_left_out() -> None:
    assert_complete([EncoderArguments], {name for name in FLAGS if " " not in name}, {})


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_acts(
    name: str, places: dict[str, Path], close: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert_acts(FLAGS[name], partial(observe_flags, places=places, close=close, caplog=caplog))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp16 --dtype bf16", "--fp16 and --dtype say the same thing"),
        ("--batch_size 0", "--batch_size must be at least 1, got 0"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--pooling_method max", "invalid choice: 'max'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse([EncoderArguments], ["--encoder", "x", *words.split()], "test")


def test_texts_for_an_index_follow_their_instruction(tiny_model_dir: Path) -> None:
    encoder = TextEncoder(EncoderArguments(encoder=str(tiny_model_dir)))
    expected = encode_texts(encoder, [f"find: {text}" for text in TEXTS], 20)
    np.testing.assert_array_equal(encode_texts(encoder, TEXTS, 20, "find: "), expected)
    assert np.abs(encode_texts(encoder, TEXTS, 20) - expected).max() > 1e-3


def test_lengths_and_sizes_that_leave_nothing_are_refused(tiny_model_dir: Path) -> None:
    model = FlagModel(str(tiny_model_dir))
    assert len(model.encode(["a b c"] * 3, max_length=3, batch_size=1)) == 3
    with pytest.raises(UsageError, match="a maximum length of 2 tokens leaves no room for text"):
        model.encode("a", max_length=2)
    for size in (0, -1):
        with pytest.raises(UsageError, match=f"a batch size of {size}"):
            model._encoders[0].slab_tokens(size, 20)
