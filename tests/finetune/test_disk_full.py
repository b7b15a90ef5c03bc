"""No room while a checkpoint is written: one line with its path, the last one whole, no half one that would be taken.

The limit on a file's size is what a full disk is to those who write: write(2) fails in the middle of a file.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

OPTIONS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(24)).parent


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "whole"
    run_training(train_words(tiny_model_dir, data, output, **OPTIONS))
    return output


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "tokenizer.json", "trainer_state.json"])
def test_one_line_and_the_last_checkpoint_whole(
    file: str, whole: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    import shutil

    output = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-1", output / "checkpoint-1")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    words = train_words(tiny_model_dir, data, output, **OPTIONS, resume_from_checkpoint=True)
    size = (whole / "checkpoint-2" / file).stat().st_size
    with room_for(size - 1):
        answer = run_training(words, check=False)
    assert answer.returncode == 2
    (line,) = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
    assert f"{output}/checkpoint-2: could not be written (" in line and "MiB are free there" in line
    assert "Traceback" not in answer.stderr
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    run_training(words)
    assert log_lines(output) == log_lines(whole)


def test_the_trained_model_itself(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {**OPTIONS, "save_strategy": "no", "max_steps": 1}
    with room_for(20_000):
        answer = run_training(train_words(tiny_model_dir, data, output, **options), check=False)
    assert answer.returncode == 2
    assert f"error: {output}: could not be written (" in answer.stderr
    assert not (output / "config.json").exists() and not list(output.glob("*.safetensors"))
