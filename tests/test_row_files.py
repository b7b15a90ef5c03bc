"""Which files of rows are read, in whatever form they come, and what is said of the others."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import datasets
import pytest

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.check_data import main as check_data
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.mining import merge, split_data_by_length
from FlagEmbedding.schema import Problems, find_files, read_records
from FlagEmbedding.utils.io import atomic_text

ROWS = [
    {"query": "한강", "pos": ["p1"], "neg": ["n1", "n2"], "neg_q": ["", "q"]},
    {"query": "b", "pos": ["p2"], "neg": ["n3", "n4"], "neg_q": ["", ""]},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = datasets.Dataset.from_list(ROWS)


def zstd(path: Path, text: str = LINES) -> None:
    with atomic_text(path) as stream:
        stream.write(text)


def written(folder: Path, form: str) -> Path:
    """The rows in a form that people have; what to name on a command line."""
    path = folder / form
    folder.mkdir(exist_ok=True)
    if form.lower().endswith(".parquet"):
        TABLE.to_parquet(path)
    elif form == "saved":
        TABLE.save_to_disk(path)
    elif form == "splits":
        datasets.DatasetDict({"train": TABLE, "test": TABLE.select([0])}).save_to_disk(path)
    elif form.endswith(".zst"):
        zstd(path)
    else:
        content = LINES.encode()
        path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


FORMS = ["a.jsonl", "A.JSONL", "a.jsonl.gz", "a.JSONL.GZ", "a.jsonl.zst", "a.parquet", "A.Parquet", "saved", "splits"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "data", form)
    named = [path] if path.is_dir() else [path, path.parent]
    for given in named:
        problems = Problems()
        (file,) = find_files([given], problems)
        found = [(r.query, r.pos, r.neg, r.neg_q) for r in read_records(file.path, problems)]
        assert found == [("한강", ["p1"], ["n1", "n2"], [[], ["q"]]), ("b", ["p2"], ["n3", "n4"], [[], []])]
        assert not problems.count
    assert check_data([str(path)]) == 0
    dataset = TrainDataset(DataArguments([str(path)], cache_path=str(tmp_path / "cache")))
    assert len(dataset) == 2 and dataset.record(0)[1].query == "한강"
    assert merge.main(["--input_file", str(path), "--output_file", str(tmp_path / "o.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text("utf-8").splitlines()] == ROWS
    assert "2 rows" in capsys.readouterr().out


def test_a_dataset_of_the_hub_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``owner/name``, from files here: what the library loads, it loads from the hub in the same way."""
    TABLE.to_parquet(tmp_path / "hub/train-00000-of-00001.parquet")
    real, asked = datasets.load_dataset, []

    def local(name: str, config: str | None = None, **more: object) -> datasets.Dataset:
        asked.append((name, config, more))
        return real(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), **more)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", local)
    problems = Problems()
    for name in ("owner/rows", "owner/rows:ko"):
        (file,) = find_files([name], problems)
        assert file.folder == name
        assert [record.query for record in read_records(file.path, problems)] == ["한강", "b"]
    assert asked == [("owner/rows", None, {"split": "train"}), ("owner/rows", "ko", {"split": "train"})]
    assert not problems.count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("owner/rows", "owner/rows: there is no such file, folder or dataset ("),
        ("owner/rows.jsonl", "owner/rows.jsonl: there is no such file or folder; check the path"),
        ("x" * 300, "there is no such file or folder"),
        ("here/rows", "here/rows: there is no such file or folder"),
        ("here/a.csv", "here/a.csv: is a .csv file; python -m FlagEmbedding.mining convert"),
        ("here/a.zip", "here/a.zip: is a .zip file; unpack it"),
        ("here/broken.parquet", "here/broken.parquet: cannot be read ("),
        ("here/broken.arrow", "here/broken.arrow: cannot be read ("),
        ("here/cut.jsonl.zst", "here/cut.jsonl.zst: cannot be read (Truncated compressed stream)"),
        ("here/bad.jsonl.gz", "here/bad.jsonl.gz: cannot be read ("),
        ("here/saved", "here/saved: the saved dataset cannot be read ("),
        ("here/tests", "here/tests: the folder holds a saved dataset without a split train"),
        ("here/none.parquet", "here/none.parquet: the file is empty"),
        ("here/wide.jsonl", "here/wide.jsonl:1: the file is UTF-16; save the file as UTF-8"),
        ("here/nul.jsonl", "here/nul.jsonl:1: holds a NUL character; it may be UTF-16; save it as UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    TABLE.save_to_disk(here / "saved")
    (here / "saved/state.json").write_text("{}")
    datasets.DatasetDict({"test": TABLE}).save_to_disk(here / "tests")
    TABLE.select([]).to_parquet(here / "none.parquet")
    zstd(here / "cut.jsonl.zst", LINES * 100)
    (here / "cut.jsonl.zst").write_bytes((here / "cut.jsonl.zst").read_bytes()[:-4])
    damaged = bytearray(gzip.compress(LINES.encode() * 100))
    damaged[30:40] = bytes(10)
    (here / "bad.jsonl.gz").write_bytes(damaged)
    (here / "wide.jsonl").write_bytes(LINES.encode("utf-16"))
    (here / "nul.jsonl").write_bytes(b'{"query": "a\0"}\n')
    for name in ("a.csv", "a.zip", "broken.parquet", "broken.arrow"):
        (here / name).write_bytes(b"query,pos\n1,2\n")
    assert check_data([given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert error.startswith("error: ")


def test_whatever_a_folder_holds_besides_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("FlagEmbedding"), "propagate", True)
    for name in (
        "b.jsonl",
        "a.json",
        "C.JSONL",
        "d.jsonl.gz",
        ".e.jsonl",
        "b.jsonl.gz",
        "f.csv",
        "g.txt",
        "deep/h.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = LINES.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    problems = Problems()
    with caplog.at_level(logging.WARNING):
        found = [Path(file.path).name for file in find_files([tmp_path], problems)]
    assert found == ["C.JSONL", "a.json", "b.jsonl", "d.jsonl.gz"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path}: not read: b.jsonl.gz, deep/, f.csv, g.txt (name what should be read too)"
    assert not problems.count


def test_a_link_to_rows_that_are_not_there_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    for name in ("b.jsonl", "c.parquet", "notes.txt"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    problems = Problems()
    find_files([tmp_path], problems)
    assert [(Path(p.path).name, p.found) for p in problems.first] == [
        (name, f"is a link to {tmp_path / 'elsewhere' / name}, which is not there") for name in ("b.jsonl", "c.parquet")
    ]


def test_a_folder_without_rows_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "rows.ndjson").write_text(LINES)
    problems = Problems()
    find_files([tmp_path], problems)
    (found,) = problems.first
    assert found.found == "the folder holds no .json or .jsonl file" and "it has deep/, rows.ndjson" in found.hint


def test_marks_blank_lines_and_line_ends_are_no_rows(tmp_path: Path) -> None:
    first, second = LINES.splitlines()
    path = tmp_path / "a.jsonl"
    for text in (
        f"\ufeff{first}\r\n\r\n \t\n{second}",
        f"\ufeff\n{first}\n\ufeff{second}\n",  # a mark alone in a line; files with marks joined
        f"\ufeff[{first},\r\n{second}]",
    ):
        path.write_bytes(text.encode())
        assert [record.query for record in read_records(path)] == ["한강", "b"]


def test_parts_of_a_packed_file_are_called_after_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    zstd(tmp_path / "train.jsonl.zst")
    words = ["--input_path", str(tmp_path / "train.jsonl.zst"), "--output_dir", str(tmp_path / "out")]
    assert not split_data_by_length.main([*words, "--model_name_or_path", str(tiny_model_dir), "--length_list", "0"])
    assert (tmp_path / "out/train_len-0-inf.jsonl").read_text("utf-8") == LINES


def test_twins_of_positives_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "می\u200cرود"
    rows = [{"query": "q", "pos": [text], "neg": [neg]} for neg in ("other", text.replace("\u200c", "\u00a0"))]
    rows[1]["neg"].append(text.replace("\u200c", ""))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check_data([str(tmp_path / "a.jsonl")]) == 0
    assert "note: 2 negatives read like a positive of their row (first: line 2)" in capsys.readouterr().out
