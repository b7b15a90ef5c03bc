# ruff: noqa: F811  (fixtures of another file are arguments here)
"""Another token budget, as after running out of memory, goes on with the shards that are there."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
from indexing.test_encoding import AGAIN, OPTIONS, encoder, ended_by, files  # noqa: F401
from tqdm import tqdm

from FlagEmbedding.indexing import encoding
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.utils.errors import UsageError


@pytest.mark.parametrize("options", [OPTIONS, AGAIN], ids=["plain", "overwrite"])
def test_a_smaller_batch_size_goes_on(
    options: IndexArguments,
    tiny_model_dir: Path,
    files: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, model = tmp_path / "out", str(tiny_model_dir)
    large = TextEncoder(EncoderArguments(encoder=model, batch_size=256))
    small = TextEncoder(EncoderArguments(encoder=model, batch_size=1))
    build_index(large, files, tmp_path / "whole", "ko", OPTIONS)
    with ended_by("write", 3):
        build_index(large, files, folder, "ko", options)
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.json")}
    assert len(kept) == 4  # three shards and the manifest
    with caplog.at_level(logging.INFO), ended_by("write", 1):
        build_index(small, files, folder, "ko", options)
    assert "--batch_size" in caplog.text and "the vectors agree up to rounding" in caplog.text
    assert {name: (folder / "shards" / name).stat().st_mtime_ns for name in kept} == kept
    build_index(small, files, folder, "ko", options)
    vectors = [faiss.read_index(str(place / "index")).reconstruct_n(0, 18) for place in (tmp_path / "whole", folder)]
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    assert (folder / "docid").read_bytes() == (tmp_path / "whole/docid").read_bytes()
    # What is whole stays as it is, too; another length does not pass for the same.
    assert not build_index(large, files, folder, "ko", OPTIONS)
    with pytest.raises(UsageError, match="max_passage_length: 32 there, 16 here"):
        build_index(large, files, folder, "ko", replace(OPTIONS, max_passage_length=16))


def test_the_folder_is_listed_once_however_many_shards(
    encoder: TextEncoder,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed: Counter[str] = Counter()
    real = os.listdir
    bar = partial(tqdm, mininterval=0)  # shows every step
    monkeypatch.setattr(encoding, "progress", lambda what, total, done: bar(desc=what, total=total, initial=done))
    monkeypatch.setattr(os, "listdir", lambda path: (listed.update([os.path.basename(path)]), real(path))[1])
    counts = []
    for size in (9, 1):
        listed.clear()
        build_index(encoder, files, tmp_path / f"out-{size}", "ko", replace(OPTIONS, shard_size=size))
        counts.append(listed["shards"])
    assert counts[0] == counts[1] <= 4
    assert json.loads((tmp_path / "out-1/manifest.json").read_text())["rows"] == 18
