"""Step 2's judgments: where they are looked for, and the corpus they belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.evaluation.runs import NAME, QUERIES, RECORD, step2


@pytest.mark.parametrize(
    "name", ["qrels.miracl-v1.0-ko-dev.tsv", "miracl-v1.0-ko/qrels/qrels.miracl-v1.0-ko-dev.tsv", "ko.txt"]
)
def test_other_names_of_the_judgments(work: Path, name: str) -> None:
    assert step2() == 0
    expected = json.loads((work / f"eval_results/{NAME}.json").read_text())["results"]
    target = work / "elsewhere" / name
    target.parent.mkdir(parents=True)
    shutil.move(work / "qrels/miracl-v1.0-ko_qrels_qrels.miracl-v1.0-ko-dev.tsv", target)
    assert step2("--qrels_dir", "elsewhere") == 0
    assert json.loads((work / f"eval_results/{NAME}.json").read_text())["results"] == expected
    assert step2("--qrels_dir", str(target)) == 0  # the file itself


def test_judgments_in_qrels_dir_come_before_those_of_data_dir(work: Path) -> None:
    folder = work / "data/miracl-v1.0-ko/qrels"
    folder.mkdir()
    (folder / "qrels.miracl-v1.0-ko-dev.tsv").write_text("0-0\tQ0\t7#0\t1\n")
    assert step2("--data_dir", "data") == 0
    assert json.loads((work / f"eval_results/{NAME}.json").read_text())["queries"] == {"ko": 12}
    assert step2("--data_dir", "data", "--qrels_dir", "empty") == 0
    assert json.loads((work / f"eval_results/{NAME}.json").read_text())["queries"] == {"ko": 1}


def index_of(work: Path, docids: Sequence[str]) -> Path:
    folder = work / f"corpus-index/{NAME}/ko"
    folder.mkdir(parents=True)
    (folder / "docid").write_text("".join(f"{docid}\n" for docid in docids))
    (folder / "manifest.json").write_text(json.dumps({"identity": RECORD["encoder"], "rows": len(docids)}))
    return folder


def test_judged_passages_that_the_index_does_not_have(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    right = [f"{qid}#right" for qid in QUERIES]
    folder = index_of(work, [*right[2:], "7#0"])
    assert step2("--index_save_dir", "corpus-index") == 0
    lines = [record.getMessage() for record in caplog.records if "not in the index" in record.getMessage()]
    said = f"2 of 12 passages judged relevant ({right[0]} …) are not in the index"
    assert len(lines) == 1
    assert said in lines[0]
    caplog.clear()
    (folder / "docid").write_text("".join(f"{docid}\r\n" for docid in right))  # whole, as another tool may write it
    assert step2("--index_save_dir", "corpus-index") == 0
    assert "not in the index" not in caplog.text


def test_judgments_of_another_corpus_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = index_of(work, ["7#0", "8#0"])
    record = {**RECORD, "index": {**RECORD["index"], "folder": str(folder)}}
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(record))  # the index that step 1 names
    assert step2() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder}: none of the 12 passages judged relevant (0-0#right …) is in the index")
    assert not (work / "eval_results").exists()


def test_the_index_that_the_command_names_goes_before_the_recorded_one(work: Path) -> None:
    index_of(work, [f"{qid}#right" for qid in QUERIES])
    moved = work / "moved"
    moved.mkdir()
    (moved / "docid").write_text("7#0\n")  # what lies now where step 1 found its index
    record = {**RECORD, "index": {**RECORD["index"], "folder": str(moved)}}
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(record))
    assert step2() == 2
    assert step2("--index_save_dir", "corpus-index") == 0
