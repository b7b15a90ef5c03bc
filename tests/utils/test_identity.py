"""Made by the same inputs? Every difference counts and is named; what cannot be read was not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import (
    as_json,
    check_identity,
    differences,
    digest,
    file_digest,
    fingerprints,
    hashing,
    made_by,
    model_fingerprint,
)


def test_differences_are_named_in_both_directions() -> None:
    there, here = {"a": 1, "gone": True, "same": [1, 2]}, {"a": 2, "new": None, "same": (1, 2), "more": 0}
    assert differences(there, here) == [
        "a: 1 there, 2 here",
        "gone: true there, null here",
        "more: null there, 0 here",
    ]
    assert differences({"text": "x" * 61}, {"text": "y"}) == [f"text: {'x' * 28}…{'x' * 28} there, y here"]
    assert differences({"text": "길" * 60}, {"text": 1}) == [f"text: {'길' * 60} there, 1 here"]
    with pytest.raises(UsageError, match=r"^out does not fit this command: a: 1 there, 2 here; gone: .*\. do that$"):
        check_identity(there, here, "out", "do that")
    check_identity(here, dict(here), "out", "do that")


def test_identities_are_compared_as_they_are_written() -> None:
    assert as_json({1: (2, 3)}) == {"1": [2, 3]}
    assert differences({"1": [2]}, {1: (2,)}) == []


def test_a_digest_is_the_same_on_every_machine_and_depends_on_everything() -> None:
    assert digest("a", {"y": 1, "x": 2}) == digest("a", {"x": 2, "y": 1})
    distinct = [digest("ab"), digest("a", "b"), digest(["a", "b"]), digest("a", "b", None), digest("b", "a"), digest(1)]
    assert len(set(distinct)) == len(distinct)


def test_a_record_that_cannot_be_read_was_made_by_nobody(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert not made_by(record, {})
    for content in (b"{", b"\xff", b"[1]", b"null", b"[" * 100_000, b'{"a": 2}', b'{"identity": {"a": 2}, "a": 1}'):
        record.write_bytes(content)
        assert not made_by(record, {"a": 1}), content[:20]
    for right in ({"a": [1]}, {"identity": {"a": [1]}, "figures": 3}):
        record.write_text(json.dumps(right))
        assert made_by(record, {"a": (1,)})
    record.write_text('{"a": [1], "more": 2}')
    assert not made_by(record, {"a": (1,)})


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(path) == first, "time and size are as they were: not read again"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()
    path.write_bytes(b"three")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_digest(path) == hashlib.sha256(b"three").hexdigest()
    assert fingerprints([path]) == [{"name": "a", "sha256": hashlib.sha256(b"three").hexdigest()}]
    with pytest.raises(DataError, match="absent: cannot be read: No such file"):
        fingerprints([tmp_path / "absent"])


def test_what_was_hashed_while_it_was_read_is_not_read_again(tmp_path: Path) -> None:
    path, broken = tmp_path / "a", tmp_path / "b"
    for each in (path, broken):
        each.write_bytes(b"content")
    with hashing(path) as told:
        told.update(b"what its reader said")
    assert file_digest(path) == hashlib.sha256(b"what its reader said").hexdigest()
    with pytest.raises(KeyError), hashing(broken) as told:
        told.update(b"con")
        raise KeyError
    assert file_digest(broken) == hashlib.sha256(b"content").hexdigest(), "half a reading counts for nothing"
    with pytest.raises(DataError, match="absent: cannot be read"), hashing(tmp_path / "absent"):
        pass


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "a.bin", "sparse_linear.pt", "tokenizer.json", "sentencepiece.bpe.model"],
)
def test_a_models_fingerprint_follows_every_file_that_decides_vectors(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    before = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / name).write_text("other")
    after = model_fingerprint(tmp_path)
    assert after != before
    (tmp_path / name).rename(tmp_path / f"other-{name}")
    assert model_fingerprint(tmp_path) != after
