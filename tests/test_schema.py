"""The matrix of broken input: what is wrong, the one line printed for it, and exit code 2; and what is read as what."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.check_data import main as check_data
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.schema import Problems, TrainRecord, find_files, read_records
from FlagEmbedding.utils.errors import DataError

GOOD = {
    "query": "소양강은 어디에서 한강과 만나는가?",
    "pos": ["소양강은 인제에서 시작해 춘천에서 북한강으로 흘러든다."],
    "neg": ["소양강댐은 1973년에 완공된 사력댐이다.", "북한강은 금강산 부근에서 발원한다."],
    "pos_scores": [0.9],
    "neg_scores": [0.2, 0.4],
    "neg_q": ["소양강댐은 언제 완공되었는가?", "북한강은 어디에서 발원하는가?"],
}


def changed(**changes: object) -> str:
    """The good row as a JSON line, with these keys changed; ``...`` takes a key out."""
    row = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(row, ensure_ascii=False)


PAIR = 'give one item for each, "" where a negative has none'
PASSAGES = "give a list of at least one passage"
PASSAGE = "give the passage's text, or take the item out"
QUERY = "give the query's text"
NEG_Q = 'give a query that this negative answers, several in a list, or "" for none'
OBJECT = 'write an object: {"query": …, "pos": […], "neg": […]}'
LINE = "write one whole JSON object a line"

# name: the second line of the file, and what is printed after "FILE:2: "
BAD_ROWS: dict[str, tuple[str | bytes, str]] = {
    "cut short": (changed()[:40], f"broken JSON (Expecting value at column 40); {LINE}"),
    "trailing comma": ('{"query": "a",}', "broken JSON ({}); " + LINE),
    "string not closed": ('{"query": "강', f"broken JSON (Unterminated string starting at column 11); {LINE}"),
    "two on a line": ("{} {}", f"broken JSON (Extra data at column 4); {LINE}"),
    "not JSON": ("query\tpos\tneg", f"broken JSON (Expecting value at column 1); {LINE}"),
    "bottomless": ("[" * 100_000, "broken JSON ({}); " + LINE),
    "a list": ('["q", "p", "n"]', f"the row is a list; {OBJECT}"),
    "a string": ('"hello"', f"the row is the text 'hello'; {OBJECT}"),
    "null": ("null", f"the row is null; {OBJECT}"),
    "not UTF-8": ('{"query": "강"}'.encode("euc-kr"), "byte 0xb0 at column 12 is not UTF-8; save the file as UTF-8"),
    "no query": (changed(query=...), f"query is missing; {QUERY}"),
    "query null": (changed(query=None), f"query is null; {QUERY}"),
    "query a list": (changed(query=["a"]), f"query is a list; {QUERY}"),
    "query empty": (changed(query=""), f"query is empty text; {QUERY}"),
    "query blank": (changed(query=" \n"), f"query is empty text; {QUERY}"),
    "query half a character": (
        '{"query": "a\\ud83d", "pos": ["p"], "neg": ["n"]}',
        "query holds half of a surrogate pair at character 2; write whole characters",
    ),
    "no pos": (changed(pos=..., pos_scores=...), f"pos is missing; {PASSAGES}"),
    "pos empty": (changed(pos=[], pos_scores=...), f"pos is an empty list; {PASSAGES}"),
    "pos null": (changed(pos=None, pos_scores=...), f"pos is null; {PASSAGES}"),
    "pos an object": (changed(pos={"text": "p"}, pos_scores=...), f"pos is an object; {PASSAGES}"),
    "pos empty text": (changed(pos="", pos_scores=...), f"pos is empty text; {PASSAGES}"),
    "pos item null": (changed(pos=["p", None], pos_scores=[1, 2]), f"pos[1] is null; {PASSAGE}"),
    "no neg": (changed(neg=..., neg_scores=..., neg_q=...), f"neg is missing; {PASSAGES}"),
    "neg empty": (changed(neg=[], neg_scores=..., neg_q=...), f"neg is an empty list; {PASSAGES}"),
    "neg item a number": (changed(neg=["n", 7]), f"neg[1] is the number 7; {PASSAGE}"),
    "neg item empty": (changed(neg=["n", ""]), f"neg[1] is empty text; {PASSAGE}"),
    "scores too few": (changed(neg_scores=[0.5]), "neg_scores has 1 items, neg has 2; give one score for each"),
    "scores too many": (changed(pos_scores=[1, 2]), "pos_scores has 2 items, pos has 1; give one score for each"),
    "score null": (changed(neg_scores=[0.5, None]), "neg_scores[1] is null; give a finite number"),
    "score NaN": (changed(neg_scores=[float("nan"), 1]), "neg_scores[0] is NaN; give a finite number"),
    "score inf": (changed(pos_scores=[float("inf")]), "pos_scores[0] is infinite; give a finite number"),
    "score huge": (changed(pos_scores=[10**400]), "pos_scores[0] is infinite; give a finite number"),
    "score text": (changed(pos_scores=["0.5"]), "pos_scores[0] is the text '0.5'; give a finite number"),
    "score true": (changed(pos_scores=[True]), "pos_scores[0] is true; give a finite number"),
    "scores an object": (
        changed(pos_scores={"a": 1}),
        "pos_scores is an object; give a list of numbers, or leave the key out",
    ),
    "neg_q too few": (changed(neg_q=["q"]), f"neg_q has 1 items, neg has 2; {PAIR}"),
    "neg_q too many": (changed(neg_q=["q", "r", "s"]), f"neg_q has 3 items, neg has 2; {PAIR}"),
    "neg_q null": (changed(neg_q=["q", None]), f"neg_q[1] is null; {NEG_Q}"),
    "neg_q number": (changed(neg_q=["q", 1.5]), f"neg_q[1] is the number 1.5; {NEG_Q}"),
    "neg_q an object": (
        changed(neg_q={"0": "q"}),
        "neg_q is an object; give a list parallel to neg, or leave the key out",
    ),
    "neg_q inner null": (
        changed(neg_q=["q", ["r", None]]),
        "neg_q[1][1] is null; give the query's text, or take the item out",
    ),
}


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_one_line_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, expected = BAD_ROWS[name]
    path = write(tmp_path / "train.jsonl", changed(), line, changed())
    assert check_data([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    before, _, after = f"error: {path}:2: {expected}\n".partition("{}")  # {}: wording of the Python version
    assert err.startswith(before)
    assert err.endswith(after)
    assert err.count("\n") == 1


FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "missing path": ({}, "{}/train: there is no such file or folder; check the path"),
    "empty folder": (
        {"train/readme.txt": b"x"},
        "{}/train: the folder holds no .json or .jsonl file; put the training rows there, one JSON object a line, or "
        "name them: it has readme.txt",
    ),
    "empty file": (
        {"train/a.jsonl": b""},
        "{}/train/a.jsonl: the file is empty; write one JSON object a line, or remove the file",
    ),
    "blank lines only": (
        {"train/a.jsonl": b"\n \n\r\n"},
        "{}/train/a.jsonl: the file is empty; write one JSON object a line, or remove the file",
    ),
    "empty array": (
        {"train/a.json": b"[]"},
        "{}/train/a.json: the file is an empty array; write at least one object into it",
    ),
    "array with a bad row": (
        {"train/a.json": b'[\n  {"query": "q", "pos": "p", "neg": "n"},\n  {"query": "q",\n   "pos": "p"}\n]'},
        "{}/train/a.json:3: neg is missing; give a list of at least one passage",
    ),
    "array cut short": (
        {"train/a.json": b'[\n  {"query": "q", "pos": "p", "neg": "n"},\n'},
        "{}/train/a.json:3: broken JSON (Expecting value at column 1); write one JSON object a line, or one array of "
        "objects",
    ),
    "array not UTF-8": (
        {"train/a.json": b'[\n{"query": "q",\n "pos": "\xb0", "neg": "n"}]'},
        "{}/train/a.json:3: byte 0xb0 at column 10 is not UTF-8; save the file as UTF-8",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_one_line_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, expected = FILES[name]
    for relative, content in files.items():
        (tmp_path / relative).parent.mkdir(exist_ok=True)
        (tmp_path / relative).write_bytes(content)
    assert check_data([str(tmp_path / "train")]) == 2
    assert capsys.readouterr().err == f"error: {expected.replace('{}', str(tmp_path))}\n"


def test_hidden_files_and_other_endings_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", ".c.jsonl", "d.jsonl.gz", "e.txt", "deeper/f.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, changed())
    problems = Problems()
    found = find_files([tmp_path, tmp_path / "d.jsonl.gz"], problems)
    assert [(Path(file.path).name, file.folder) for file in found] == [
        ("a.json", str(tmp_path)), ("b.jsonl", str(tmp_path)), ("d.jsonl.gz", str(tmp_path)),
    ]  # fmt: skip
    assert not problems.count


def test_numbers_at_the_edge_of_float(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", changed(neg_scores=[1.7976931348623157e308, -1.7976931348623157e308]))
    (record,) = read_records(path)
    assert record.neg_scores == [sys.float_info.max, -sys.float_info.max]
    problems = Problems()
    assert not list(read_records(write(path, changed(neg_scores=[-(10**400), float("-inf")])), problems))
    assert [problem.found for problem in problems.first] == ["is infinite", "is infinite"]


def test_training_gives_the_same_lines_before_any_model(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", changed(), changed(neg=[], neg_scores=..., neg_q=...))
    with pytest.raises(DataError) as error:
        TrainDataset(DataArguments([str(path)], cache_path=str(tmp_path / "cache")))
    assert str(error.value) == f"{path}:2: neg is an empty list; {PASSAGES}"
    assert not list((tmp_path / "cache").rglob("*.arrow")), "nothing of a broken file is cached"


def test_the_command_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", changed(), '{"query": "q"')
    command = [sys.executable, "-m", "FlagEmbedding.finetune.check_data", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {path}:2: broken JSON (Expecting ',' delimiter at column 14); {LINE}\n"


def test_first_twenty_problems_and_the_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", *[changed(neg_q=["q", None])] * 15)
    write(tmp_path / "b.jsonl", *[changed(query=None, pos=None, pos_scores=...)] * 30)
    assert check_data([str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 75 problems in the data, the first 20:"
    assert len(lines) == 21
    assert lines[15] == f"  {tmp_path}/a.jsonl:15: neg_q[1] is null; {NEG_Q}"
    assert lines[16:18] == [
        f"  {tmp_path}/b.jsonl:1: query is null; {QUERY}",
        f"  {tmp_path}/b.jsonl:1: pos is null; {PASSAGES}",
    ]


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", changed(pos_scores=["long " * 100_000]))
    problems = Problems()
    assert not list(read_records(path, problems))
    assert problems.count == 1
    assert len(str(problems.first[0])) < 300


ACCEPTED: dict[str, tuple[str, TrainRecord]] = {
    "all columns": (
        changed(),
        TrainRecord(
            GOOD["query"],  # type: ignore[arg-type]
            GOOD["pos"],  # type: ignore[arg-type]
            GOOD["neg"],  # type: ignore[arg-type]
            [0.9],
            [0.2, 0.4],
            [[query] for query in GOOD["neg_q"]],  # type: ignore[attr-defined]
            1,
        ),
    ),
    "strings for lists": (
        '{"query": "q", "pos": "p", "neg": "n", "pos_scores": 2, "neg_scores": [-1], "neg_q": "m"}',
        TrainRecord("q", ["p"], ["n"], [2.0], [-1.0], [["m"]], 1),
    ),
    "extra columns": (
        '{"id": 7, "query": "q", "pos": ["p"], "neg": ["n"], "meta": {"lang": null}, "score": NaN}',
        TrainRecord("q", ["p"], ["n"], line=1),
    ),
    "optional columns null": (
        '{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": null, "neg_scores": null, "neg_q": null}',
        TrainRecord("q", ["p"], ["n"], line=1),
    ),
    "an empty text for the queries of a single negative": (
        '{"query": "q", "pos": ["p"], "neg": ["n"], "neg_q": ""}',
        TrainRecord("q", ["p"], ["n"], neg_q=[[]], line=1),
    ),
    "no query for some negatives, several for others": (
        '{"query": "q", "pos": ["p"], "neg": ["a", "b", "c", "d"], "neg_q": ["", [], ["x", "y"], "z"]}',
        TrainRecord("q", ["p"], ["a", "b", "c", "d"], neg_q=[[], [], ["x", "y"], ["z"]], line=1),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_row(name: str, tmp_path: Path) -> None:
    line, expected = ACCEPTED[name]
    assert list(read_records(write(tmp_path / "a.jsonl", line))) == [expected]


def test_layouts_of_a_file(tmp_path: Path) -> None:
    """BOM, CRLF, blank lines, no last newline, gzip, one array: the same records, each with its line."""
    rows = [json.dumps({"query": f"q{i}", "pos": "p", "neg": "n"}) for i in range(3)]
    layouts = {
        "plain.jsonl": ("\n".join(rows).encode(), [1, 2, 3]),
        "bom.jsonl": (b"\xef\xbb\xbf" + "\n".join(rows).encode(), [1, 2, 3]),
        "crlf.jsonl": ("\r\n".join(rows).encode(), [1, 2, 3]),
        "blank.jsonl": ("\n\n".join(["", *rows, ""]).encode(), [3, 5, 7]),
        "packed.jsonl.gz": (gzip.compress("\n".join(rows).encode()), [1, 2, 3]),
        "array.json": (("[\n" + ",\n".join(rows) + "\n]").encode(), [2, 3, 4]),
        "oneline.json": (("[" + ",".join(rows) + "]").encode(), [1, 1, 1]),
        "pretty.json": (json.dumps([json.loads(row) for row in rows], indent=1).encode(), [2, 7, 12]),
    }
    for name, (content, lines) in layouts.items():
        (tmp_path / name).write_bytes(content)
        records = list(read_records(tmp_path / name))
        assert [record.query for record in records] == ["q0", "q1", "q2"], name
        assert [record.line for record in records] == lines, name


def test_valid_rows_come_even_from_a_file_with_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", changed(), "{", changed(query="둘째"))
    problems = Problems()
    assert [record.line for record in read_records(path, problems)] == [1, 3]
    assert problems.count == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        list(read_records(path))
