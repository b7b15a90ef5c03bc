"""Step 0 as a program: killed three times, shared by two processes, and always the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import STEPS, run_script, run_together

from tests.conftest import write_tiny
from tests.evaluation.conftest import QUERIES, make_passages, write_collection

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = str(REPOSITORY / "evaluation" / "step0-generate_embedding.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(model: Path, collection: Path, out: Path, *more: str) -> list[str]:
    paths = ["--encoder", str(model), "--data_dir", str(collection), "--index_save_dir", str(out)]
    return [SCRIPT, *paths, "--languages", "sw", "--shard_size", "2", *more]


@pytest.fixture(scope="module")
def long_collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough shards of two passages that a kill meets the work half done."""
    return write_collection(tmp_path_factory.mktemp("long"), "sw", make_passages(600), QUERIES)


@pytest.fixture(scope="module")
def demo_sized_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that threads sharing a product would add up in another order."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return write_tiny(folder, "xlmr", hidden_size=384, intermediate_size=1536, initializer_range=0.05)


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir: Path, long_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_script(STEPS[0], arguments(tiny_model_dir, long_collection, out)[1:]).returncode == 0
    return out / tiny_model_dir.name / "sw"


def assert_same(folder: Path, undisturbed: Path) -> None:
    for name in ("index", "docid"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == ["docid", "index", "manifest.json"]


def shards(folder: Path) -> int:
    return len(list((folder / "shards").glob("shard-*.json"))) if (folder / "shards").exists() else 0


def test_killed_three_times_the_index_is_the_same(
    tiny_model_dir: Path, long_collection: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, *arguments(tiny_model_dir, long_collection, tmp_path)]
    folder = tmp_path / tiny_model_dir.name / "sw"
    for target in (20, 90, 180):
        started = shards(folder)
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while shards(folder) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
        assert target <= shards(folder) < 300
        assert shards(folder) > started
        assert not (folder / "index").exists()
    # What a kill in the middle of the last copying leaves behind.
    (folder / ".index.abc.tmp").write_bytes(b"half")
    (folder / "index").write_bytes(b"half")
    answer = run_script(STEPS[0], command[2:])
    assert answer.returncode == 0
    assert "going on, " in answer.stderr
    assert_same(folder, undisturbed)


def test_two_processes_write_the_same_index(
    tiny_model_dir: Path, long_collection: Path, undisturbed: Path, tmp_path: Path
) -> None:
    answer = run_together(STEPS[0], arguments(tiny_model_dir, long_collection, tmp_path)[1:], ENVIRONMENT)
    assert answer.returncode == 0, answer.stderr[-2000:]
    folder = tmp_path / tiny_model_dir.name / "sw"
    assert_same(folder, undisturbed)
    assert '"processes": 2' in (folder / "manifest.json").read_text()


def test_four_threads_write_the_same_index(demo_sized_model: Path, tmp_path: Path, collection: Path) -> None:
    indexes = []
    for threads in ("1", "4"):
        command = [sys.executable, SCRIPT, "--encoder", str(demo_sized_model), "--data_dir", str(collection)]
        command += ["--languages", "ko", "--index_save_dir", str(tmp_path / threads)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        indexes.append((tmp_path / threads / demo_sized_model.name / "ko" / "index").read_bytes())
    assert indexes[0] == indexes[1]


def test_other_arguments_end_in_one_line(tiny_model_dir: Path, long_collection: Path, undisturbed: Path) -> None:
    out = undisturbed.parent.parent
    answer = run_script(STEPS[0], arguments(tiny_model_dir, long_collection, out, "--pooling_method", "mean")[1:])
    assert answer.returncode == 2
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "pooling: cls there, mean here" in errors[0]
    assert "Traceback" not in answer.stderr
