"""An index out of a corpus: read twice, continued after any end, shared out by rank, and nothing else is touched."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.planning import LOCK
from FlagEmbedding.inference.arguments import WINDOW, EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval import approximate
from FlagEmbedding.retrieval.approximate import load_or_build
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.shards import ShardStore
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.locking import exclusive

OPTIONS = IndexArguments(max_passage_length=32, shard_size=4)
AGAIN = IndexArguments(max_passage_length=32, shard_size=4, overwrite=True)
_opened: list[Counter[str]] = []  # while one is in it, the files that are opened are counted there


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], str | os.PathLike):
        _opened[-1][os.path.basename(arguments[0])] += 1


sys.addaudithook(_count)


@contextmanager
def opens() -> Iterator[Counter[str]]:
    """Names of the files that are opened in the block, and how often."""
    counts: Counter[str] = Counter()
    _opened.append(counts)
    try:
        yield counts
    finally:
        _opened.pop()


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> TextEncoder:
    return TextEncoder(EncoderArguments(encoder=str(tiny_model_dir)))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """18 passages in two files: five shards of four, the last a short one."""
    paths = []
    for number, rows in enumerate((range(10), range(10, 18))):
        paths.append(tmp_path / f"docs-{number}.jsonl.gz")
        with gzip.open(paths[-1], "wt", encoding="utf-8") as out:
            out.writelines(
                json.dumps({"docid": f"{i}#0", "title": "t", "text": f"text {i * i} {i}"}) + "\n" for i in rows
            )
    return paths


@pytest.fixture
def whole(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> tuple[bytes, bytes]:
    build_index(encoder, files, tmp_path / "whole", "ko", OPTIONS)
    return contents(tmp_path / "whole")


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "index").read_bytes(), (folder / "docid").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def ended_by(method: str, after: int) -> Iterator[None]:
    """The process is ended at call number ``after`` of a method of ``ShardStore``."""
    real: Callable[..., Any] = getattr(ShardStore, method)
    calls = 0

    def ending(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, method, ending)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_the_corpus_is_opened_twice_whatever_is_there(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> None:
    folder, both = tmp_path / "out", {"docs-0.jsonl.gz": 2, "docs-1.jsonl.gz": 2}

    def counted(options: IndexArguments) -> dict[str, int]:
        for path in files:  # as another process would find them: not hashed yet
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
        with opens() as found:
            build_index(encoder, files, folder, "ko", options)
        return {name: count for name, count in found.items() if name.startswith("docs-")}

    assert counted(OPTIONS) == both
    assert counted(OPTIONS) == {"docs-0.jsonl.gz": 1, "docs-1.jsonl.gz": 1}  # its checksum alone
    assert counted(AGAIN) == both
    with ended_by("write", 2):
        build_index(encoder, files, folder, "ko", AGAIN)
    assert counted(AGAIN) == both
    with ended_by("write", 2):
        build_index(encoder, files, folder, "ko", AGAIN)
    assert counted(IndexArguments(max_passage_length=16, shard_size=4, overwrite=True)) == both


def test_shards_are_the_encoders_window_unless_told() -> None:
    assert IndexArguments().shard_size == WINDOW == 2_048
    with pytest.raises(UsageError, match="--shard_size must be at least 1, got 0"):
        IndexArguments(shard_size=0)


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_ended_at_any_shard_the_index_is_the_same(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, whole: tuple[bytes, bytes], after: int
) -> None:
    folder = tmp_path / "out"
    with ended_by("write", after):
        build_index(encoder, files, folder, "ko", OPTIONS)
    assert names(folder) == ["shards"]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.f32")}
    assert len(kept) == after
    (folder / "shards" / ".shard-000003.f32.abc.tmp").write_bytes(b"half")
    with ended_by("remove", 0):
        build_index(encoder, files, folder, "ko", OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was finished was encoded again"
    assert contents(folder) == whole
    made = (folder / "index").stat().st_mtime_ns
    assert build_index(encoder, files, folder, "ko", OPTIONS) is False
    assert names(folder) == ["docid", "index", "manifest.json"]
    assert (folder / "index").stat().st_mtime_ns == made, "an index that was whole was made again"


def test_what_was_begun_with_other_arguments_is_refused_or_thrown_away(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    folder = tmp_path / "out"
    with ended_by("write", 2):
        build_index(encoder, files, folder, "ko", IndexArguments(max_passage_length=8, shard_size=4))
    with pytest.raises(UsageError, match="max_passage_length: 8 there, 32 here"):
        build_index(encoder, files, folder, "ko", OPTIONS)
    assert len(list((folder / "shards").glob("*.f32"))) == 2
    build_index(encoder, files, folder, "ko", AGAIN)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 5}, "shard_size: 4 there, 5 here"),
        ({"with_title": True}, "with_title: false there, true here"),
        ({"passage_instruction_for_retrieval": "p: "}, "passage_instruction: null there, p:  here"),
        ({"max_passage_length": 31}, "max_passage_length: 32 there, 31 here"),
    ],
)
def test_whatever_decides_the_vectors_is_compared(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder, other = tmp_path / "out", replace(OPTIONS, **change)
    with ended_by("write", 1):
        build_index(encoder, files, folder, "ko", OPTIONS)
    with pytest.raises(UsageError, match=rf"shards/manifest.json does not fit this command: {message}\. Give"):
        build_index(encoder, files, folder, "ko", other)
    build_index(encoder, files, folder, "ko", OPTIONS)
    with pytest.raises(UsageError, match=rf"out/manifest.json does not fit this command: {message}\. Give"):
        build_index(encoder, files, folder, "ko", other)


def test_another_encoder_language_or_corpus_is_refused(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, tiny_moe_dir: Path
) -> None:
    folder = tmp_path / "out"
    build_index(encoder, files, folder, "ko", OPTIONS)
    with pytest.raises(UsageError, match="language: ko there, fa here"):
        build_index(encoder, files, folder, "fa", OPTIONS)
    with pytest.raises(UsageError, match="corpus: "):
        build_index(encoder, files[:1], folder, "ko", OPTIONS)
    with pytest.raises(UsageError, match="model: "):
        build_index(TextEncoder(EncoderArguments(encoder=str(tiny_moe_dir))), files, folder, "ko", OPTIONS)
    assert names(folder) == ["docid", "index", "manifest.json"]


def test_overwrite_goes_on_with_its_own_work_and_not_with_what_was_finished(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, whole: tuple[bytes, bytes]
) -> None:
    folder = tmp_path / "out"
    build_index(encoder, files, folder, "ko", OPTIONS)
    with ended_by("write", 3):
        build_index(encoder, files, folder, "ko", AGAIN)
    kept = {path: path.stat().st_mtime_ns for path in (folder / "shards").glob("*.f32")}
    with ended_by("remove", 0):  # joined, and the shards are left
        build_index(encoder, files, folder, "ko", AGAIN)
    assert len(kept) == 3 and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((folder / "shards").glob("*.f32"))) == 5
    with ended_by("write", 1):  # what is left was finished: all is encoded again
        build_index(encoder, files, folder, "ko", AGAIN)
    assert len(list((folder / "shards").glob("*.f32"))) == 1
    build_index(encoder, files, folder, "ko", AGAIN)
    assert contents(folder) == whole and names(folder) == ["docid", "index", "manifest.json"]


def test_an_error_of_the_last_write_is_not_lost(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ShardStore.write

    def full(store: ShardStore, shard: int, *content: Any) -> None:
        if shard == 4:
            raise DataError("disk full")
        real(store, shard, *content)

    monkeypatch.setattr(ShardStore, "write", full)
    with pytest.raises(DataError, match="disk full"):
        build_index(encoder, files, tmp_path / "out", "ko", OPTIONS)
    assert names(tmp_path / "out") == ["shards"]


def test_a_disk_that_is_too_small_is_known_before_the_work(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 18 vectors of 32 floats, once in shards and once in the index
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=2 * 18 * 32 * 4 - 1))
    with pytest.raises(DataError, match=r"18 vectors of 32 need 4.61kB more .*, 4.61kB are free"):
        build_index(encoder, files, tmp_path / "out", "ko", OPTIONS)
    assert not list((tmp_path / "out" / "shards").glob("*.f32"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=2 * 18 * 32 * 4))
    assert build_index(encoder, files, tmp_path / "out", "ko", OPTIONS)


def test_one_process_at_a_time(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        exclusive(folder / LOCK, folder),
        pytest.raises(UsageError, match=rf"another process \({os.getpid()} on .+\) is writing to it"),
    ):
        build_index(encoder, files, folder, "ko", OPTIONS)
    assert names(folder) == []
    (folder / LOCK).write_text("1 on elsewhere")  # what a kill leaves
    assert build_index(encoder, files, folder, "ko", OPTIONS)
    assert names(folder) == ["docid", "index", "manifest.json"]


def test_the_lock_is_held_until_the_index_is_made(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tried = tmp_path / "out", []

    def trying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: ShardStore, *content: Any) -> Any:
            with pytest.raises(UsageError, match="another process"), exclusive(folder / LOCK, folder):
                pass
            tried.append(real.__name__)
            return real(store, *content)

        return call

    for method in ("write", "digests", "remove"):
        monkeypatch.setattr(ShardStore, method, trying(getattr(ShardStore, method)))
    build_index(encoder, files, folder, "ko", OPTIONS)
    assert tried == ["write"] * 5 + ["digests"] * 5 + ["remove"]


def test_files_of_others_stay_where_they_are(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    foreign = ["index.html", "index.html.json", ".notes.tmp", "photo.txt"]
    folder.mkdir()
    for name in foreign:
        (folder / name).write_text('{"somebody": "else"}')
    build_index(encoder, files, folder, "ko", OPTIONS)
    load_or_build(FlatIndex(folder), "HNSW8")
    assert names(folder) == sorted([*foreign, "docid", "index", "index.HNSW8", "index.HNSW8.json", "manifest.json"])
    build_index(encoder, files, folder, "ko", AGAIN)
    assert names(folder) == sorted([*foreign, "docid", "index", "manifest.json"])


def test_a_folder_of_others_shards_is_refused(encoder: TextEncoder, files: list[Path], tmp_path: Path) -> None:
    photo = tmp_path / "out" / "shards" / "photo.txt"
    photo.parent.mkdir(parents=True)
    photo.write_text("a memory")
    for options in (OPTIONS, AGAIN):
        with pytest.raises(UsageError, match=r"shards holds 'photo.txt', which this program did not write"):
            build_index(encoder, files, tmp_path / "out", "ko", options)
        assert names(tmp_path / "out") == ["shards"] and photo.read_text() == "a memory"


@pytest.mark.parametrize("name", ["out", "out/shards"])
def test_a_file_where_a_folder_belongs_is_one_line(
    name: str, encoder: TextEncoder, files: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(DataError, match=r"something else is in the way while .*File exists: "):
        build_index(encoder, files, tmp_path / "out", "ko", OPTIONS)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("there", [["index", "docid"], ["index"], ["docid"]])
def test_an_index_of_another_program_is_never_written_over(
    encoder: TextEncoder, files: list[Path], tmp_path: Path, there: list[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in there:
        (folder / name).write_text("theirs")
    with pytest.raises(UsageError, match=rf"{there[0]} was not written by this program: move it away"):
        build_index(encoder, files, folder, "ko", AGAIN)
    if len(there) == 2:
        assert build_index(encoder, files, folder, "ko", OPTIONS) is False
    else:
        with pytest.raises(UsageError, match="was not written by this program"):
            build_index(encoder, files, folder, "ko", OPTIONS)
    assert [(folder / name).read_text() for name in there] == ["theirs"] * len(there)


def test_an_approximate_index_of_another_program_is_never_written_over(
    encoder: TextEncoder, files: list[Path], tmp_path: Path
) -> None:
    build_index(encoder, files, tmp_path / "out", "ko", OPTIONS)
    index = FlatIndex(tmp_path / "out")
    for name in ("index.HNSW8", "index.HNSW8.json"):
        (tmp_path / "out" / name).write_text("theirs")
        with pytest.raises(UsageError, match=f"{name} was not written by this program"):
            load_or_build(index, "HNSW8")
        assert (tmp_path / "out" / name).read_text() == "theirs"
        (tmp_path / "out" / name).unlink()
    real, calls = approximate.write_json_atomic, []

    def ending(*content: Any) -> None:
        calls.append(content)
        if len(calls) == 2:  # the index is there, its record is not yet
            raise KeyboardInterrupt
        real(*content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(approximate, "write_json_atomic", ending)
        load_or_build(index, "HNSW8")
    assert (tmp_path / "out" / "index.HNSW8").exists()
    assert load_or_build(index, "HNSW8").ntotal == 18  # what a kill left is known as ours


def test_the_folder_is_not_listed_for_every_shard(encoder: TextEncoder, tmp_path: Path) -> None:
    path = tmp_path / "docs-0.jsonl"
    path.write_text("".join(json.dumps({"docid": str(i), "text": "x"}) + "\n" for i in range(60)))
    listed = 0
    real = ShardStore.finished

    def counting(store: ShardStore) -> set[int]:
        nonlocal listed
        listed += 1
        return real(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardStore, "finished", counting)
        build_index(encoder, [path], tmp_path / "out", "ko", IndexArguments(max_passage_length=8, shard_size=1))
    assert listed < 10
    assert np.isfinite(FlatIndex(tmp_path / "out").read_rows(range(60))).all()
