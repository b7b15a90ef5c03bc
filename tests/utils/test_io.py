"""Files: read to the last line or refused with its number, written whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import zlib
from pathlib import Path

import pytest

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open, numbered_lines, read_json, sha256_file, write_json_atomic

MEBIBYTE = 1 << 20


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_have_the_numbers_that_an_editor_shows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeff길\n\n  \nb\r\nlast".encode())
    assert list(numbered_lines(path, "test")) == [(1, "길\n"), (4, "b\r\n"), (5, "last")]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_is_hashed_whole_while_it_is_read(tmp_path: Path, name: str) -> None:
    # over a mebibyte also when it is packed
    path = write(tmp_path / name, random.Random(0).randbytes(3 * MEBIBYTE // 2).hex().encode() + b"\nend\n")
    assert path.stat().st_size > 3 * MEBIBYTE // 2
    digest = hashlib.sha256()
    assert [number for number, _ in numbered_lines(path, "test", digest)] == [1, 2]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_file(path)


@pytest.mark.parametrize(("how", "error"), [("cut", EOFError), ("deflate", zlib.error), ("garbage", OSError)])
def test_a_damaged_archive_is_one_line_with_its_place(tmp_path: Path, how: str, error: type[Exception]) -> None:
    path = tmp_path / "a.gz"
    whole = gzip.compress("".join(f"{i} {i * i}\n" for i in range(40_000)).encode())
    broken = {"cut": whole[:-30], "deflate": whole[:10] + b"\x07" + whole[11:], "garbage": b"<html>"}[how]
    path.write_bytes(whole + broken)
    with pytest.raises(
        DataError, match=r"a\.gz:\d+: the test file cannot be read further .* make or fetch it again"
    ) as caught:
        list(numbered_lines(path, "test"))
    assert isinstance(caught.value.__cause__, error)


def test_what_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such test file"):
        list(numbered_lines(tmp_path / "absent", "test"))
    with pytest.raises(DataError, match=r"latin:2: not UTF-8 text \(invalid .* at byte 3\)"):
        list(numbered_lines(write(tmp_path / "latin", b"one\ntwo\xe9\n"), "test"))
    with pytest.raises(DataError, match="cannot be read further"):
        list(numbered_lines(tmp_path, "test"))


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "new" / "out"
    first, second = ("one", "two") if mode == "w" else (b"one", b"two")
    with atomic_open(path, mode) as stream:
        stream.write(first)
        stream.flush()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_open(path, mode) as stream:
        stream.write(second)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["out"]
    with atomic_open(path, mode) as stream:
        stream.write(second)
        assert path.read_bytes() == b"one", "the file that was there is whole until the new one is"
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_open(tmp_path / "out") as stream:
            stream.write("x")
        assert os.umask(mask) == mask, "the mask of the process was changed"
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_is_written_for_people_and_other_programs(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"길": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "길": [') and text.endswith("}\n") and json.loads(text) == {"길": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "b.json", float("nan"))
    assert os.listdir(tmp_path) == ["a.json"]
