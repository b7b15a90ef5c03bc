"""Jobs: a journal that survives kill -9 anywhere, outputs that are whole or absent, refusals in one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from FlagEmbedding.mining.common.jobs import Job, journal_path, work_folder
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.errors import UsageError

# Works through 400 inputs, a few rows each (sometimes none), slowly enough to be killed in the middle.
WORKER = """
import sys, time
from itertools import islice
from FlagEmbedding.mining.common.jobs import Job
with Job(sys.argv[1], {"seed": 3}) as job:
    for i in islice(range(400), job.done, None):
        job.add([{"i": i, "text": "한강 " * (i % 50), "part": p} for p in range(i % 3)], {"n": i % 3})
        time.sleep(float(sys.argv[2]))
    total = sum(note["n"] for note in job.notes())
    assert job.finish() == total
"""


def expected() -> bytes:
    rows = [{"i": i, "text": "한강 " * (i % 50), "part": p} for i in range(400) for p in range(i % 3)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_kill_9_at_random_moments_gives_the_identical_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    generator, kills, partial = random.Random(5), 0, 0
    for _ in range(4):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(output), "0.005"])
        journal = journal_path(output)
        before = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 30
        while worker.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > before + generator.randrange(500, 4000):
                worker.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += worker.wait() == -signal.SIGKILL
        partial += journal.exists() and journal.stat().st_size > before
        assert not output.exists()
    assert kills == partial == 4
    subprocess.run([sys.executable, "-c", WORKER, str(output), "0"], check=True)
    assert output.read_bytes() == expected()
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_torn_last_entry_is_done_again(tmp_path: Path, cut: int) -> None:
    output = tmp_path / "out.jsonl"
    with Job(output, {}) as job:
        for i in range(5):
            job.add([{"i": i}])
    journal = journal_path(output)
    journal.write_bytes(journal.read_bytes()[:-cut])
    with Job(output, {}) as job:
        assert job.done == 4
        job.add([{"i": 4}])
        assert job.finish() == 5
    assert [json.loads(line)["i"] for line in output.open()] == [0, 1, 2, 3, 4]


def test_zeros_that_a_crashed_machine_left_are_cut_off(tmp_path: Path) -> None:
    with Job(tmp_path / "out.jsonl", {}) as job:
        job.add([{"i": 0}])
    with open(journal_path(tmp_path / "out.jsonl"), "ab") as stream:
        stream.write(b"\0" * 100 + b"\n")
    with Job(tmp_path / "out.jsonl", {}) as job:
        assert job.done == 1


def test_a_journal_of_other_arguments_is_refused_or_thrown_away(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Job(output, {"seed": 1}) as job:
        job.add([{"i": 0}])
    with pytest.raises(UsageError, match=r"seed: 1 there, 2 here.*--overwrite"):
        Job(output, {"seed": 2})
    with Job(output, {"seed": 1}, overwrite=True) as job:
        assert job.done == 1  # what fits is continued even then
    with Job(output, {"seed": 2}, overwrite=True) as job:
        assert job.done == 0


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UsageError, match="is there already"):
        Job(output, {})
    with Job(output, {}, overwrite=True) as job:
        job.add([{"i": 0}])
        assert output.read_text() == "mine\n"  # until the job is finished
        job.finish()
    assert output.read_text() == '{"i": 0}\n' and os.listdir(tmp_path) == ["out.jsonl"]


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    with Job(tmp_path / "out.jsonl", {}), pytest.raises(UsageError, match="another process"):
        Job(tmp_path / "out.jsonl", {}, overwrite=True)


def test_training_does_not_take_a_journal_for_data(tmp_path: Path) -> None:
    with Job(tmp_path / "out.jsonl", {}) as job:
        job.add([{"i": 0}])
    problems = Problems()
    assert find_files([tmp_path], problems) == []
    assert problems.count == 1


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    with Job(tmp_path / "out.jsonl", {}) as job:
        job.add([{"text": "half a surrogate \ud83d"}])
    with Job(tmp_path / "out.jsonl", {}) as job:
        assert job.done == 1
        job.finish()
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"text": "half a surrogate \ud83d"}


def test_a_file_of_somebody_else_in_a_work_folder_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.work").mkdir()
    (tmp_path / ".out.jsonl.work/photo.txt").write_text("mine")
    for output in ("out.jsonl", "other.jsonl"):
        with work_folder(tmp_path / output) as work:
            for name in ("texts", "offsets", "docid", "passages.json", "docs-0.jsonl", "negatives", ".texts.x1.tmp"):
                (work / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [".out.jsonl.work"]
    assert [path.name for path in (tmp_path / ".out.jsonl.work").iterdir()] == ["photo.txt"]
