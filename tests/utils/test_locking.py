"""One process at a time: refused with the holder's name, free again after any end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.locking import exclusive

HOLD = """
import sys, time
from pathlib import Path
from FlagEmbedding.utils.locking import exclusive
with exclusive(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for _ in range(2):  # looking does not wipe the holder's name
            with (
                pytest.raises(UsageError, match=rf"^out: another process \({other.pid} on .+\) is writing"),
                exclusive(path, "out"),
            ):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert path.exists()
    with exclusive(path, "out"):
        assert path.with_name(".lock.holder").read_text().startswith(f"{os.getpid()} on ")
    assert os.listdir(path.parent) == []


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), exclusive(tmp_path / ".lock", "out"):
        raise ValueError("inside")
    with exclusive(tmp_path / ".lock", "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_who_waits_comes_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLD.replace("time.sleep(60)", "time.sleep(0.5)"), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with caplog.at_level("INFO", "FlagEmbedding"), exclusive(path, "out", wait=True):
            assert path.with_name(".lock.holder").read_text().startswith(f"{os.getpid()} on ")
    assert f"out: waiting for another process ({other.pid} on " in caplog.text
