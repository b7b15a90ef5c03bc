"""Folders of sparse, BM25 and colbert against the published classes, and what is on disk after kills and again."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from FlagEmbedding import BGEM3FlagModel
from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.indexing import modes as building
from FlagEmbedding.indexing.arguments import IndexArguments, StoreArguments
from FlagEmbedding.indexing.modes import build_modes
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.ragged import RaggedStore, RaggedTable
from FlagEmbedding.utils.errors import DataError, UsageError
from tests.evaluation.conftest import make_passages, write_collection

OPTIONS = IndexArguments(max_passage_length=24, shard_size=40, passage_instruction_for_retrieval="about: ")
ALL = StoreArguments(["sparse", "colbert", "bm25"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = write_collection(tmp_path_factory.mktemp("modes"), "ko", make_passages(23), {"1": "river"})
    return sorted((root / "miracl-corpus-v1.0-ko").iterdir())


@pytest.fixture(scope="module")
def encoder(tiny_heads_dir: Path) -> TextEncoder:
    return TextEncoder(EncoderArguments(encoder=str(tiny_heads_dir), heads=True))


@pytest.fixture(scope="module")
def built(encoder: TextEncoder, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_modes(encoder, files, folder, "ko", OPTIONS, ALL, ALL.parts)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }


def test_rows_are_what_the_public_class_gives(built: Path, tiny_heads_dir: Path, files: list[Path]) -> None:
    texts = [passage.text for path in files for passage in read_file(path)]
    model = BGEM3FlagModel(str(tiny_heads_dir), passage_instruction_for_retrieval="about: ", passage_max_length=24)
    found = model.encode_corpus(texts, max_length=24, return_sparse=True, return_colbert_vecs=True)
    sparse, colbert, bm25 = (RaggedTable(built / mode) for mode in ("sparse", "colbert", "bm25"))
    assert [table.rows for table in (sparse, colbert, bm25)] == [23] * 3
    assert sum(map(len, found["lexical_weights"])) > 100
    special = {model.tokenizer.cls_token_id, model.tokenizer.eos_token_id}
    for row, text in enumerate(texts):
        weights = {int(token): weight for token, weight in found["lexical_weights"][row].items()}
        entries = sparse.row(row)
        assert entries["ids"].tolist() == sorted(weights)
        np.testing.assert_allclose(entries["weights"], [weights[i] for i in sorted(weights)], atol=2e-6)
        np.testing.assert_allclose(colbert.vectors(row), found["colbert_vecs"][row], atol=5e-4)  # half precision
        tokens = Counter(model.tokenizer(text, truncation=True, max_length=24)["input_ids"])
        entries = bm25.row(row)
        own = dict(zip(entries["ids"].tolist(), entries["weights"].tolist(), strict=True))
        assert own == {token: count for token, count in tokens.items() if token not in special}


def test_same_bytes_after_a_kill_in_each_mode_and_with_modes_added_later(
    built: Path, encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, left = RaggedStore.put, [0]

    def stop(self: RaggedStore, *args: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        put(self, *args)  # type: ignore[arg-type]

    for done in (1, 4):  # sparse and colbert take turns, five shards of five passages each
        left[0] = done
        with monkeypatch.context() as patch:
            patch.setattr(RaggedStore, "put", stop)
            with pytest.raises(KeyboardInterrupt):
                build_modes(encoder, files, tmp_path / "killed", "ko", OPTIONS, ALL, ALL.parts)
    assert not (tmp_path / "killed/sparse/manifest.json").exists()
    build_modes(encoder, files, tmp_path / "killed", "ko", OPTIONS, ALL, ALL.parts)
    assert contents(tmp_path / "killed") == contents(built)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*")}
    build_modes(encoder, files, tmp_path / "killed", "ko", OPTIONS, ALL, ALL.parts)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*") if p in before} == before
    with pytest.raises(UsageError, match="max_passage_length: 24 there, 12 here"):
        build_modes(encoder, files, tmp_path / "killed", "ko", replace(OPTIONS, max_passage_length=12), ALL, ["sparse"])


def test_a_full_disk_while_shards_are_joined_is_no_damage_of_a_shard(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_modes(encoder, files, tmp_path, "ko", OPTIONS, ALL, ["sparse"])
    work = tmp_path / "sparse/shards"
    before = sorted(path.name for path in work.iterdir())
    store = RaggedStore(work, json.loads((work / "manifest.json").read_text()))

    class Full:
        def write(self, piece: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.copy(0, "ids", store.digests(0)["ids"], Full(), hashlib.sha256())  # type: ignore[arg-type]
    assert sorted(path.name for path in work.iterdir()) == before


def test_a_damaged_shard_and_a_changed_file_are_named(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_modes(encoder, files, tmp_path, "ko", OPTIONS, ALL, ["sparse"])
    shard = tmp_path / "sparse/shards/shard-000000.weights"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"shard 0 of .* is damaged .*weights"):
        build_modes(encoder, files, tmp_path, "ko", OPTIONS, ALL, ["sparse"])
    build_modes(encoder, files, tmp_path, "ko", OPTIONS, ALL, ["sparse"])
    with open(tmp_path / "sparse/ids", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DataError, match=r"ids is not the file that manifest\.json"):
        RaggedTable(tmp_path / "sparse")


def test_int8_is_near_and_a_full_disk_is_said_before(
    built: Path, encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    small = StoreArguments(["colbert"], "int8")
    with caplog.at_level(logging.INFO):
        build_modes(encoder, files, tmp_path, "ko", OPTIONS, small, small.parts)
    assert "colbert vectors of 16 (int8), about " in caplog.text and "will take about" in caplog.text
    whole, eighth = RaggedTable(built / "colbert"), RaggedTable(tmp_path / "colbert")
    assert eighth.arrays["vectors"].dtype == np.int8
    for row in range(whole.rows):
        np.testing.assert_allclose(eighth.vectors(row), whole.vectors(row), atol=5e-3)
    usage = building.shutil.disk_usage("/")
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"23 passages of about \d+ colbert vectors need .*1.00kB are free"):
        build_modes(encoder, files, tmp_path / "full", "ko", OPTIONS, ALL, ["colbert"])
