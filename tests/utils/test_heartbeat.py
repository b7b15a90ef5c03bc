"""Real processes: one is killed or stopped, and the others end in one line; a slow one is not lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from FlagEmbedding.utils import heartbeat

WORKER = Path(__file__).with_name("lost_process.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """What a test starts, ended with it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
    for path in tmp_path.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def start(started: list[subprocess.Popen[str]], folder: Path, what: str, launcher: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, str(WORKER), str(folder), what], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    started.append(process)
    return process


def pids(folder: Path, count: int) -> list[int]:
    """Process numbers of all ranks, once all of them have met."""
    until = time.monotonic() + 120
    while len(files := sorted(folder.glob("*.pid"))) < count or not all(path.read_text() for path in files):
        assert time.monotonic() < until, "they never met"
        time.sleep(0.05)
    time.sleep(2)  # for the first signs, which say who gives them
    return [int(path.read_text()) for path in files]


def named(stderr: str) -> list[str]:
    """The lines that say who is lost."""
    return [line for line in stderr.splitlines() if "gave no sign of life" in line]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_ends_the_others_in_one_line(
    number: signal.Signals, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start(started, tmp_path, "wait", [*LAUNCHER, "3"])
    lost = pids(tmp_path, 3)[1]
    os.kill(lost, number)
    (tmp_path / "go").touch()
    _, stderr = run.communicate(timeout=100)
    assert run.returncode != 0
    (line,) = named(stderr)
    assert re.search(rf"rank 1 \(process {lost} on \S+\) gave no sign of life for \d+ s: killed, stopped or cut", line)
    assert line.endswith("What was finished is kept: the same command goes on")


@pytest.mark.parametrize("lost", [0, 2])
def test_without_torchrun_too(lost: int, started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    """Rank 0 keeps the store that all others meet at: with it the store is gone."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    runs = []
    for rank in range(3):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
                patch.setenv(name, value)
            runs.append(start(started, tmp_path, "wait", [sys.executable]))
    os.kill(pids(tmp_path, 3)[lost], signal.SIGSTOP)
    begun = time.monotonic()
    (tmp_path / "go").touch()
    left = [run.communicate(timeout=60)[1] for rank, run in enumerate(runs) if rank != lost]
    assert time.monotonic() - begun < 30
    assert [run.returncode for rank, run in enumerate(runs) if rank != lost] == [1, 1]
    (line,) = [line for stderr in left for line in named(stderr)]
    assert f" rank {lost} (process " in line


def test_a_slow_process_is_not_lost(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    run = start(started, tmp_path, "slow", [*LAUNCHER, "2"])
    _, stderr = run.communicate(timeout=100)
    assert run.returncode == 0 and named(stderr) == []


def test_a_run_that_is_stopped_as_a_whole_goes_on(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    run = start(started, tmp_path, "wait", [*LAUNCHER, "2"])
    everyone = pids(tmp_path, 2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everyone:
            os.kill(pid, number)
        time.sleep(6)
    (tmp_path / "go").touch()
    _, stderr = run.communicate(timeout=100)
    assert run.returncode == 0 and named(stderr) == [], stderr[-2000:]


def test_a_process_that_says_why_it_ends_is_the_only_one_to_speak(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = start(started, tmp_path, "refused", [*LAUNCHER, "2"])
    _, stderr = run.communicate(timeout=100)
    assert run.returncode != 0 and stderr.count("error: what rank 1 says") == 1 and named(stderr) == []


def test_the_others_end_within_a_minute() -> None:
    longest = (heartbeat.PATIENCE + 3) * heartbeat.INTERVAL
    assert 30 <= longest < 60
