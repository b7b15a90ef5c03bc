"""A command in a process of its own: time, memory, last words, and that it ends with its caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from FlagEmbedding.utils.commands import gpu_memory_mb, last_words, run_command
from FlagEmbedding.utils.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_killed_command_is_named_as_such(tmp_path: Path) -> None:
    code = "import os, signal; print('half way', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(DataError, match=r"x failed \(exit 137, killed: out of memory\?\): half way; all of it in"):
        run_command([sys.executable, "-c", code], tmp_path / "log", "x")


def test_time_memory_and_last_words_of_a_command(tmp_path: Path) -> None:
    code = "block = bytearray(90_000_000); block[::4096] = b'x' * len(block[::4096])"
    small = run_command([sys.executable, "-c", "pass"], tmp_path / "small.log", "small")
    large = run_command([sys.executable, "-c", code], tmp_path / "large.log", "large")
    assert 80 <= large["peak_rss_mb"] - small["peak_rss_mb"] <= 110  # a child's own peak, in whichever order they run
    again = run_command([sys.executable, "-c", "pass"], tmp_path / "small.log", "small")
    assert abs(again["peak_rss_mb"] - small["peak_rss_mb"]) < 20
    assert large["seconds"] > 0
    assert (tmp_path / "small.log").read_text().startswith(f"$ {sys.executable} -c pass")
    broken = [sys.executable, "-c", "import sys; print('error: no such thing'); print('bye'); sys.exit(2)"]
    with pytest.raises(
        DataError, match=r"cell: train failed \(exit 2\): error: no such thing; all of it in .*broken.log"
    ):
        run_command(broken, tmp_path / "broken.log", "cell: train")
    (tmp_path / "log").write_text("a\nValueError: b\n\n")
    assert last_words(tmp_path / "log") == "ValueError: b"


def test_a_command_does_not_outlive_its_caller(tmp_path: Path) -> None:
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(120)"
    caller = (
        "import signal, sys; from pathlib import Path; from FlagEmbedding.utils.commands import run_command; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored where pytest runs in the background
        f"run_command([sys.executable, '-c', {code!r}], Path('log'), 'x')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "evaluation")])}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        (tmp_path / "pid").unlink(missing_ok=True)
        started = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", caller], cwd=tmp_path, env=environment) as process:
            wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
            process.send_signal(number)
        child = Path("/proc") / (tmp_path / "pid").read_text()
        wait_for(lambda child=child: not child.exists())
        assert time.monotonic() - started < 100  # it did not just come to its own end


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.1)


def test_gpu_memory_is_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=memory.used ] && printf "1024\\n2048\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_memory_mb() == 3072
    assert run_command([sys.executable, "-c", "pass"], tmp_path / "log", "x")["peak_gpu_mb"] == 3072
    program.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert gpu_memory_mb() is None
