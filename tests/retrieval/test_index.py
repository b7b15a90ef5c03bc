"""The index folder: faiss's own bytes, checked shards, refusals in one line."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from FlagEmbedding.retrieval.index import DocIds, FlatIndex, assemble_index, index_folder, index_name
from FlagEmbedding.retrieval.searcher import search
from FlagEmbedding.retrieval.shards import ShardStore, check_manifest, clear_disk_errors, read_manifest
from FlagEmbedding.utils.errors import DataError, UsageError


def fill(folder: Path, vectors: np.ndarray, shard_size: int, identity: dict | None = None) -> ShardStore:
    store = ShardStore.create(folder / "shards", identity or {"model": "m"}, *vectors.shape, shard_size)
    for shard in range(len(store)):
        start, stop = store.span(shard)
        store.write(shard, vectors[start:stop], [f"d#{i}" for i in range(start, stop)])
    return store


def random_vectors(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


@pytest.mark.parametrize(("rows", "dimension", "shard_size"), [(1, 3, 4), (10, 7, 4), (12, 8, 4), (5, 1, 100)])
def test_the_file_is_what_faiss_itself_writes(tmp_path: Path, rows: int, dimension: int, shard_size: int) -> None:
    vectors = random_vectors(rows, dimension)
    assemble_index(fill(tmp_path, vectors, shard_size), tmp_path)
    reference = faiss.IndexFlatIP(dimension)
    reference.add(vectors)
    faiss.write_index(reference, str(tmp_path / "reference"))
    assert (tmp_path / "index").read_bytes() == (tmp_path / "reference").read_bytes()
    assert (tmp_path / "docid").read_text() == "".join(f"d#{i}\n" for i in range(rows))
    opened = faiss.read_index(str(tmp_path / "index"))
    np.testing.assert_array_equal(opened.reconstruct_n(0, rows), vectors)


def test_blocks_and_rows_are_the_vectors(tmp_path: Path) -> None:
    vectors = random_vectors(23, 5)
    assemble_index(fill(tmp_path, vectors, 6), tmp_path)
    index = FlatIndex(tmp_path)
    blocks = list(index.blocks(4))
    assert [start for start, _ in blocks] == [0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), vectors)
    np.testing.assert_array_equal(index.read_rows([22, 0, 7]), vectors[[22, 0, 7]])


def test_docids_hold_any_script_and_a_missing_line_end(tmp_path: Path) -> None:
    ids = ["1#0", "길이", "a" * 3000, "7"]
    (tmp_path / "with").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    (tmp_path / "without").write_text("\n".join(ids), encoding="utf-8")
    for name in ("with", "without"):
        docids = DocIds(tmp_path / name)
        assert len(docids) == 4
        assert list(docids) == ids
        assert docids[1:3] == ids[1:3]


def test_names_of_folders() -> None:
    assert index_name("BAAI/bge-m3") == "bge-m3"
    assert index_name("/models/bge-m3/") == "bge-m3"
    assert index_name("out/run1/checkpoint-200") == "run1_checkpoint-200"
    assert index_name("out/run1/checkpoint-200/") == "run1_checkpoint-200"
    assert index_folder("idx", "out/run1/checkpoint-200", "ko") == Path("idx/run1_checkpoint-200/ko")


def test_name_of_a_relative_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run2" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run2")
    assert index_name("./checkpoint-3") == "run2_checkpoint-3"
    assert index_name(".") == "run2"


def test_other_arguments_are_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, random_vectors(4, 2), 2, {"pooling": "cls", "max_passage_length": 512, "model": "a"})
    path = tmp_path / "shards" / "manifest.json"
    manifest = read_manifest(path)
    assert manifest is not None
    with pytest.raises(UsageError, match=r"max_passage_length: 512 there, 256 here; pooling: cls there, mean here"):
        check_manifest(manifest, {"pooling": "mean", "max_passage_length": 256, "model": "a"}, path)


@pytest.mark.parametrize("suffix", ["f32", "docid", "json"])
def test_a_damaged_shard_is_named_and_can_be_encoded_again(tmp_path: Path, suffix: str) -> None:
    vectors = random_vectors(9, 4)
    store = fill(tmp_path, vectors, 4)
    path = store.path(1, suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 1 of .* is damaged .* run the same command again"):
        assemble_index(store, tmp_path)
    assert not (tmp_path / "index").exists()
    assert not (tmp_path / "manifest.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
    assert store.finished() == {0, 2}
    store.write(1, vectors[4:8], [f"d#{i}" for i in range(4, 8)])
    assemble_index(store, tmp_path)
    np.testing.assert_array_equal(FlatIndex(tmp_path).read_rows(range(9)), vectors)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    store = fill(tmp_path, random_vectors(9, 4), 4)
    store.path(2, "f32").unlink()
    with pytest.raises(DataError, match="shard 2"):
        assemble_index(store, tmp_path)


def test_shards_without_a_manifest_never_count(tmp_path: Path) -> None:
    store = fill(tmp_path, random_vectors(9, 4), 4)
    (store.folder / "manifest.json").unlink()
    assert read_manifest(store.folder / "manifest.json") is None
    before = sorted(path.name for path in store.folder.iterdir())
    with pytest.raises(UsageError, match=r"holds 'shard-000000.docid', which this program did not write or cannot"):
        ShardStore.create(store.folder, {"model": "other"}, 9, 4, 4)
    assert sorted(path.name for path in store.folder.iterdir()) == before


@pytest.mark.parametrize(("rows", "sizes"), [(8, [4, 4]), (9, [4, 4, 1]), (1, [1]), (4, [4])])
def test_there_are_as_many_shards_as_it_takes(tmp_path: Path, rows: int, sizes: list[int]) -> None:
    store = ShardStore.create(tmp_path / "shards", {}, rows, 2, 4)
    assert [stop - start for start, stop in map(store.span, range(len(store)))] == sizes


def test_a_shard_whose_record_was_not_written_is_not_there(tmp_path: Path) -> None:
    store = fill(tmp_path, random_vectors(9, 4), 4)
    store.path(1, "json").unlink()
    assert store.finished() == {0, 2}


def test_only_files_of_the_store_are_removed(tmp_path: Path) -> None:
    store = fill(tmp_path, random_vectors(9, 4), 4)
    foreign = ["photo.txt", "shard-000003.f32", "shard-notes.json", ".notes.tmp"]
    for name in foreign:
        (store.folder / name).write_text("somebody's")
    (store.folder / ".shard-000001.f32.abcd.tmp").write_text("half")
    assert store.finished() == {0, 1, 2}
    store.remove()
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(foreign)
    alone = fill(tmp_path / "alone", random_vectors(9, 4), 4)
    alone.remove()
    assert not alone.folder.exists()


def test_a_shard_of_another_run_is_never_joined(tmp_path: Path) -> None:
    one, two = (fill(tmp_path / name, random_vectors(9, 4, seed), 4) for seed, name in enumerate("ab"))
    for suffix in ("f32", "docid", "json"):
        one.path(1, suffix).write_bytes(two.path(1, suffix).read_bytes())
    with pytest.raises(DataError, match=r"shard 1 of .* is damaged \(another run wrote it\)"):
        assemble_index(one, tmp_path / "a")
    assert one.finished() == {0, 2}


def test_a_shard_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    store = ShardStore.create(tmp_path / "shards", {}, 4, 3, 4)
    with pytest.raises(DataError, match=r"expected 4 rows of 3, got vectors \[3, 3\]"):
        store.write(0, np.zeros((3, 3), dtype=np.float32), ["a", "b", "c"])
    with pytest.raises(DataError, match=r"got vectors \[4, 3\] and 3 docids"):
        store.write(0, np.zeros((4, 3), dtype=np.float32), ["a", "b", "c"])
    assert store.finished() == set()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The limit on file size makes the operating system refuse a write exactly as a full disk does."""
    program = f"""
import resource, sys
import numpy as np
from pathlib import Path
from FlagEmbedding.retrieval.shards import ShardStore
from FlagEmbedding.utils.cli import entry_point
def main():
    store = ShardStore.create(Path({str(tmp_path)!r}) / "shards", {{}}, 4096, 64, 2048)
    store.write(0, np.ones((2048, 64), dtype=np.float32), [str(i) for i in range(2048)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store.write(1, np.ones((2048, 64), dtype=np.float32), [str(i) for i in range(2048)])
sys.exit(entry_point(main)())
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("error: disk full while writing shard 1")
    left = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert left == ["manifest.json", "shard-000000.docid", "shard-000000.f32", "shard-000000.json"]


def test_what_is_no_flat_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run step0"):
        FlatIndex(tmp_path)
    (tmp_path / "docid").write_text("a\nb\n")
    faiss.write_index(faiss.index_factory(4, "HNSW4", faiss.METRIC_INNER_PRODUCT), str(tmp_path / "index"))
    with pytest.raises(DataError, match="expected a faiss IndexFlatIP"):
        FlatIndex(tmp_path)
    l2 = faiss.IndexFlatL2(4)
    l2.add(random_vectors(2, 4))
    faiss.write_index(l2, str(tmp_path / "index"))
    with pytest.raises(DataError, match="L2"):
        FlatIndex(tmp_path)
    ip = faiss.IndexFlatIP(4)
    ip.add(random_vectors(3, 4))
    faiss.write_index(ip, str(tmp_path / "index"))
    with pytest.raises(DataError, match="3 vectors in index, 2 ids in docid"):
        FlatIndex(tmp_path)
    os.truncate(tmp_path / "index", os.path.getsize(tmp_path / "index") - 1)
    with pytest.raises(DataError, match="damaged"):
        FlatIndex(tmp_path)


def test_the_manifest_tells_what_it_is(tmp_path: Path) -> None:
    import hashlib

    assemble_index(fill(tmp_path, random_vectors(5, 2), 2, {"model": "abc"}), tmp_path, note="seen")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["identity"] == {"model": "abc"}
    assert manifest["rows"] == 5
    assert manifest["note"] == "seen"
    for name in ("index", "docid"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert manifest["files"][name]["sha256"] == digest


def test_docids_in_another_order_are_refused(tmp_path: Path) -> None:
    assemble_index(fill(tmp_path, random_vectors(9, 4), 4), tmp_path)
    ids = (tmp_path / "docid").read_text().splitlines()
    (tmp_path / "docid").write_text("\n".join(reversed(ids)) + "\n")
    with pytest.raises(DataError, match=r"docid is not the file that manifest.json beside it lists"):
        FlatIndex(tmp_path)


def test_vectors_of_another_index_are_refused_before_any_hit(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        store = fill(tmp_path / name, random_vectors(9, 4, seed), 4)
        assemble_index(store, tmp_path / name)
    for name in ("docid", "manifest.json"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    index = FlatIndex(tmp_path / "b")
    for _ in range(2):  # refused every time, not only the first
        with pytest.raises(DataError, match=r"index is not the file that manifest.json beside it lists"):
            list(index.blocks(2))
    with pytest.raises(DataError, match=r"index is not the file"):
        search(index, random_vectors(2, 4), 3)
    sound = FlatIndex(tmp_path / "a")
    assert len(list(sound.blocks(2))) == len(list(sound.blocks(2))) == 5


def foreign(folder: Path, vectors: np.ndarray, docids: bytes) -> Path:
    """An index of another program: no manifest."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "index"))
    (folder / "docid").write_bytes(docids)
    return folder


@pytest.mark.parametrize(
    ("docids", "message"),
    [
        (b"a\n\nc\n", "docid:2: expected one word as docid, found ''"),
        (b"a\nb c\nd\n", "docid:2: expected one word as docid, found 'b c'"),
        (b"a\nb\na\n", "docid:3: 'a' was there before, in line 1"),
        (b"a\n\xe9\nc\n", "docid:2: not UTF-8 text"),
    ],
)
def test_ids_of_another_program_must_be_ids(tmp_path: Path, docids: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FlatIndex(foreign(tmp_path, random_vectors(3, 4), docids))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_of_another_program_must_be_finite(tmp_path: Path, value: float) -> None:
    vectors = random_vectors(5, 4)
    foreign(tmp_path, vectors, b"a\nb\nc\nd\ne\n")
    assert {hit.row for hit in search(FlatIndex(tmp_path), vectors[2:3], 5)[0]} == {0, 1, 2, 3, 4}
    vectors[3, 1] = value
    foreign(tmp_path, vectors, b"a\nb\nc\nd\ne\n")
    with pytest.raises(DataError, match="the vector of 'd' is not finite"):
        search(FlatIndex(tmp_path), random_vectors(1, 4), 2, block_rows=2)


@pytest.mark.parametrize("content", ["{", "[]", '{"identity": 1}', "[" * 100_000])
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    assemble_index(fill(tmp_path, random_vectors(3, 2), 2), tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest.json: .* move it away to start again") as caught:
        FlatIndex(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_encoder_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = {"model": "a", "pooling": "cls", "normalize_embeddings": True, "dimension": 2, "with_title": False}
    assemble_index(fill(tmp_path, random_vectors(3, 2), 2, identity), tmp_path)
    index = FlatIndex(tmp_path)
    index.check_encoder({**identity, "with_title": True, "dtype": "bf16"}, "hint")
    for key, other in (("model", "b"), ("pooling", "mean"), ("normalize_embeddings", False), ("dimension", 3)):
        with pytest.raises(UsageError, match=rf"was made by another encoder \({key}: .*\): do this"):
            index.check_encoder({**identity, key: other}, "do this")
    (tmp_path / "manifest.json").unlink()
    FlatIndex(tmp_path).check_encoder({**identity, "model": "b"}, "hint")
    assert "taken on trust" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_from_other_faults(number: int) -> None:
    with pytest.raises(DataError, match="disk full while writing x"), clear_disk_errors("writing x"):
        raise OSError(number, os.strerror(number), "x")


def test_other_faults_of_a_disk_are_one_line() -> None:
    for number, what in (
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "the disk failed"),
    ):
        with pytest.raises(DataError, match=rf"{what} while writing x: .*: there"), clear_disk_errors("writing x"):
            raise OSError(number, os.strerror(number), "there")
    with pytest.raises(BrokenPipeError), clear_disk_errors("writing x"):
        raise BrokenPipeError
