"""Two runs and one folder: refused, told apart, and nothing is deleted that a run of this program did not write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

from FlagEmbedding.finetune.resume.runs import Run, publish, remove_checkpoint

OPTIONS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(24)).parent


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run A: checkpoints at steps 1 to 3."""
    output = tmp_path_factory.mktemp("run") / "A"
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS))
    return output


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*")) + sorted(p.name for p in folder.glob(".*"))


def run_id(checkpoint: Path) -> str:
    return str(json.loads((checkpoint / "run.json").read_text())["run_id"])


def test_every_run_has_an_id_of_its_own(whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    for name in (".saving-20260101-000000-0a1b2c", ".saving-mine"):  # killed before its first checkpoint was whole
        (tmp_path / "B" / name / "checkpoint-1").mkdir(parents=True)
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "B", **OPTIONS))
    assert names(tmp_path / "B") == ["checkpoint-1", "checkpoint-2", "checkpoint-3", ".saving-mine"]
    (said,) = re.findall(r"run (\S+): starts", answer.stderr)
    ids = {run_id(checkpoint) for checkpoint in (tmp_path / "B").glob("checkpoint-*")}
    assert ids == {said} != {run_id(whole / "checkpoint-1")}
    assert json.loads((tmp_path / "B" / "training_args.json").read_text())["run_id"] == said
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "B", **OPTIONS, resume_from_checkpoint=True))
    assert f"run {said}: goes on from" in answer.stderr
    first = whole / "checkpoint-1"
    arguments = json.loads((first / "training_args.json").read_text())
    assert arguments["data"]["train_group_size"] == 3 and arguments["run_id"] == run_id(first)
    listed = json.loads((first / "run.json").read_text())["files"]
    there = [path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()]
    assert sorted([*listed, "run.json"]) == sorted(there)


def test_a_fresh_start_among_checkpoints_is_refused_before_anything_is_read(folder: Path) -> None:
    before = names(folder)
    words = train_words(Path("no-such-model"), Path("no-such-data"), folder, **OPTIONS)
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    (line,) = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
    assert "holds checkpoints of another run (checkpoint-1, checkpoint-2, checkpoint-3)" in line
    assert "--resume_from_checkpoint True" in line and "--overwrite_output_dir True" in line
    assert names(folder) == before


def test_told_to_a_fresh_start_removes_them_and_nothing_foreign(
    folder: Path, whole: Path, tiny_model_dir: Path, data: Path
) -> None:
    old = run_id(folder / "checkpoint-1")
    (folder / "checkpoint-3" / "notes.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "model.safetensors").write_text("mine")
    (folder / f".saving-{old}" / "checkpoint-9").mkdir(parents=True)
    options = {**OPTIONS, "max_steps": 2, "overwrite_output_dir": True}
    answer = run_training(train_words(tiny_model_dir, data, folder, **options))
    assert "checkpoint-3 holds files that no run has written: they stay" in answer.stderr
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-best"]
    assert [path.name for path in (folder / "checkpoint-3").iterdir()] == ["notes.txt"]
    assert (folder / "checkpoint-best" / "model.safetensors").read_text() == "mine"
    assert run_id(folder / "checkpoint-1") == run_id(folder / "checkpoint-2") != old
    # What is left of the old one takes no part when the new one goes on, and is in nobody's way.
    answer = run_training(
        train_words(tiny_model_dir, data, folder, **{**OPTIONS, "max_steps": 2}, resume_from_checkpoint=True)
    )
    assert "checkpoint-3 is not whole" in answer.stderr and "checkpoint-2" in answer.stderr


def test_what_no_record_lists_is_refused_even_then(folder: Path, tiny_model_dir: Path, data: Path) -> None:
    (folder / "checkpoint-2" / "run.json").unlink()
    before = sorted(folder.rglob("*"))
    words = train_words(tiny_model_dir, data, folder, **OPTIONS, overwrite_output_dir=True)
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    assert "checkpoint-2 has no run.json" in answer.stderr and "nothing was removed" in answer.stderr
    assert sorted(folder.rglob("*")) == before


def test_bad_data_removes_nothing(folder: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    before = sorted(folder.rglob("*"))
    words = train_words(tiny_model_dir, bad, folder, **OPTIONS, overwrite_output_dir=True)
    assert run_training(words, check=False).returncode == 2
    assert sorted(folder.rglob("*")) == before


def test_true_takes_the_newest_of_this_run(folder: Path, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """A folder in which two runs wrote, as older versions let them: B goes on with B's."""
    options = {**OPTIONS, "max_steps": 4, "temperature": 0.1}
    run_training(train_words(tiny_model_dir, data, tmp_path / "B", **options))
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "B" / "checkpoint-1", mixed / "checkpoint-1")
    words = train_words(tiny_model_dir, data, mixed, **options, resume_from_checkpoint=True)
    shutil.copytree(folder / "checkpoint-3", mixed / "checkpoint-3")
    answer = run_training(words, check=False)
    assert answer.returncode == 2  # A's would be written over in the end
    assert "holds checkpoints of another run (checkpoint-3)" in answer.stderr
    answer = run_training([*words, "--overwrite_output_dir", "True"])
    assert "checkpoint-3 is of another run: passed over" in answer.stderr
    assert log_lines(mixed) == log_lines(tmp_path / "B")
    assert len({run_id(path) for path in mixed.glob("checkpoint-*")}) == 1


def test_a_run_deletes_its_own_oldest_checkpoints_alone(
    folder: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "B"
    for name in ("checkpoint-best", "checkpoint-1-old"):
        (output / name).mkdir(parents=True)
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS, save_total_limit=1))
    assert names(output) == ["checkpoint-1-old", "checkpoint-3", "checkpoint-best"]
    # A checkpoint without a record beside it (of an older version) is nobody's to delete.
    (folder / "checkpoint-1" / "run.json").unlink()
    shutil.rmtree(folder / "checkpoint-3")
    words = train_words(tiny_model_dir, data, folder, **OPTIONS, save_total_limit=1, resume_from_checkpoint=True)
    run_training(words)
    assert names(folder) == ["checkpoint-1", "checkpoint-3"]


def test_going_on_from_an_older_checkpoint_keeps_what_was_written_last(
    folder: Path, tiny_model_dir: Path, data: Path
) -> None:
    (folder / "checkpoint-2" / "notes.txt").write_text("mine")
    options = {**OPTIONS, "save_total_limit": 2, "resume_from_checkpoint": folder / "checkpoint-1"}
    before = log_lines(folder)
    run_training(train_words(tiny_model_dir, data, folder, **options))
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
    assert (folder / "checkpoint-2" / "notes.txt").read_text() == "mine"  # beside a checkpoint that was written again
    assert log_lines(folder) == before


def test_a_record_never_reaches_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "photo.txt").write_text("mine")
    record = {
        "format": 1,
        "run_id": "a",
        "fingerprint": {},
        "changes": [],
        "files": ["../photo.txt", str(tmp_path / "photo.txt")],
    }
    (tmp_path / "checkpoint-1" / "run.json").write_text(json.dumps(record))
    remove_checkpoint(tmp_path / "checkpoint-1")
    assert (tmp_path / "photo.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_checkpoint_of_an_unknown_run_in_the_way_is_kept(tmp_path: Path) -> None:
    run = Run("abc")
    draft = run.draft(tmp_path) / "checkpoint-4"
    for folder in (draft, tmp_path / "checkpoint-4"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(folder))
    run.describe(draft)
    publish(draft, tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-4.before-abc"]
    assert (tmp_path / "checkpoint-4.before-abc/model.safetensors").read_text() == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4/model.safetensors").read_text() == str(draft)
