"""A corpus is read in a stream, from any position, and every kind of broken file is named before work is spent."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from FlagEmbedding.collections.corpus import Passage, passage_text, read_file, stream, survey
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import fingerprints


def write(path: Path, rows: list[object]) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.write(lines)
    return path


def passage(number: int, **changes: object) -> dict[str, object]:
    return {"docid": f"{number}#0", "title": f"title {number}", "text": f"text {number}", **changes}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    sizes, first, paths = (5, 3, 4), 0, []
    for number, size in enumerate(sizes):
        paths.append(write(tmp_path / f"docs-{number}.jsonl.gz", [passage(i) for i in range(first, first + size)]))
        first += size
    return paths


def test_counts(files: list[Path]) -> None:
    found = survey(files)
    assert (found.passages, found.total, found.empty) == ([5, 3, 4], 12, 0)


@pytest.mark.parametrize(
    "spans", [[(0, 12)], [(0, 5), (5, 10), (10, 12)], [(5, 6)], [(7, 9), (11, 12)], [(8, 12)], [(3, 8)], []]
)
def test_any_spans_of_the_corpus(files: list[Path], spans: list[tuple[int, int]]) -> None:
    found = [[p.docid for p in window] for window in stream(files, [5, 3, 4], spans)]
    assert found == [[f"{i}#0" for i in range(*span)] for span in spans]


def test_files_outside_the_spans_are_not_opened(files: list[Path]) -> None:
    files[0].write_bytes(b"no gzip")
    files[2].unlink()
    assert [p.docid for p in next(stream(files, [5, 3, 4], [(5, 8)]))] == ["5#0", "6#0", "7#0"]


def test_a_corpus_that_shrank_is_noticed(files: list[Path]) -> None:
    with pytest.raises(DataError, match="changed while it was read"):
        list(stream(files, [5, 3, 4 + 2], [(10, 14)]))


def test_plain_jsonl_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "docs-0.jsonl"
    path.write_text(json.dumps(passage(1)) + "\n\n" + json.dumps(passage(2)) + "\n")
    assert survey([path]).total == 2
    assert [p.line for p in next(stream([path], [2], [(0, 2)]))] == [1, 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([passage(1), "{broken"], ":2: not a line of JSON"),
        ([passage(1), "[1, 2]"], ":2: expected an object .* found list"),
        ([passage(1), passage(2, text=None)], ":2: expected a string as 'text', found NoneType"),
        ([{"title": "t", "text": "x"}], ":1: expected a string as 'docid'"),
        ([passage(1, docid="a b")], "without white space"),
        ([passage(1), passage(2, text="  ")], ":2: passage '2#0' has no text; .* --allow_empty True"),
        ([passage(1), passage(2), passage(1)], r":3: docid '1#0' was there before, at .*docs-0.jsonl.gz:1"),
        ([], "holds no passage"),
    ],
)
def test_broken_corpora_name_file_and_line(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write(tmp_path / "docs-0.jsonl.gz", rows)
    with pytest.raises(DataError, match=message) as caught:
        survey([path])
    assert "\n" not in str(caught.value)


def test_a_docid_twice_in_two_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"docs-{i}.jsonl.gz", [passage(i), passage(9)]) for i in range(2)]
    with pytest.raises(DataError, match=r"docs-1.jsonl.gz:2: docid '9#0' was there before, at .*docs-0.jsonl.gz:2"):
        survey(paths)


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_an_unreadable_file_is_named(files: list[Path], damage: str) -> None:
    content = bytearray(files[1].read_bytes())
    if damage == "cut":
        content = content[:-12]
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"<html>not found</html>")
    files[1].write_bytes(content)
    with pytest.raises(DataError, match=r"docs-1.jsonl.gz:\d+: "):
        survey(files)


def test_empty_passages_may_be_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "docs-0.jsonl.gz", [passage(1, text=""), passage(2, title=None)])
    found = survey([path], allow_empty=True)
    assert (found.total, found.empty) == (2, 1)


def test_the_two_text_rules() -> None:
    one = Passage("1#0", "Title", "Text.", Path("x"), 1)
    assert passage_text(one, with_title=False) == "Text."
    assert passage_text(one, with_title=True) == "Title Text."
    assert passage_text(Passage("1#0", "", "Text.", Path("x"), 1), with_title=True) == "Text."


def test_fingerprints_follow_the_bytes(files: list[Path]) -> None:
    before = fingerprints(files)
    files[1].write_bytes(files[1].read_bytes() + b"\0")
    after = fingerprints(files)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert before[0]["name"] == "docs-0.jsonl.gz"


def test_the_survey_hashes_what_it_reads(files: list[Path]) -> None:
    survey(files)
    by_survey = fingerprints(files)
    assert [found["sha256"] for found in by_survey] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"docid": "a\\ud800", "text": "x"}', ":2: 'docid' holds half a surrogate pair"),
        ('{"docid": "a", "text": "x\\udfff"}', ":2: 'text' holds half a surrogate pair"),
        ('{"docid": "a", "title": "\\ud83d", "text": "x"}', ":2: 'title' holds half a surrogate pair"),
        ("[" * 100_000 + "]" * 100_000, r":2: not a line of JSON \(nested too deeply"),
        ('{"docid": "a", "title": 1, "text": "x"}', ":2: expected a string as 'title', found int"),
        ('{"docid": "", "text": "x"}', ":2: a docid is one word"),
        ('{"docid": "a\u3000b", "text": "x"}', ":2: a docid is one word"),
    ],
)
def test_texts_that_could_not_be_written_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "docs-0.jsonl"
    path.write_text(json.dumps(passage(1)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"docs-0.jsonl{message}") as caught:
        survey([path])
    assert "\n" not in str(caught.value)


def test_a_whole_pair_a_byte_order_mark_and_a_missing_title_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "docs-0.jsonl"
    path.write_text('\ufeff{"docid": "a", "text": "\\ud83d\\ude00"}\n', encoding="utf-8")
    assert [(p.docid, p.title, p.text) for p in read_file(path)] == [("a", "", "\U0001f600")]


def test_many_docids_that_all_differ_and_one_that_does_not(tmp_path: Path) -> None:
    # More than one per bucket of hashes, and a repeat whose first place is in another file.
    rows = [passage(i) for i in range(500)]
    first = write(tmp_path / "docs-0.jsonl.gz", rows)
    assert survey([first]).total == 500
    second = write(tmp_path / "docs-1.jsonl.gz", [passage(1_000), passage(321)])
    with pytest.raises(DataError, match=r"docs-1.jsonl.gz:2: docid '321#0' was there before, at .*docs-0.jsonl.gz:322"):
        survey([first, second])


def test_an_empty_file_between_others(tmp_path: Path) -> None:
    parts = ([passage(1)], [], [passage(2), passage(3)])
    paths = [write(tmp_path / f"docs-{i}.jsonl.gz", list(part)) for i, part in enumerate(parts)]
    assert survey(paths).passages == [1, 0, 2]
    assert [[p.docid for p in window] for window in stream(paths, [1, 0, 2], [(0, 2), (2, 3)])] == [
        ["1#0", "2#0"],
        ["3#0"],
    ]
