"""Run a command in a process of its own, its output in a log, with its time and peak memory."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from FlagEmbedding.utils import measured
from FlagEmbedding.utils.errors import DataError

_GPU_SECONDS = 1.0


def run_command(command: list[str], log: Path, what: str) -> dict[str, Any]:
    """Run ``command`` with its output in ``log``: seconds, peak memory of its largest process, GPU memory if any."""
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = log.with_suffix(".peak")
    words = [sys.executable, "-I", "-S", measured.__file__, str(peak), *command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        channels: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        with _gpu_memory() as gpu_memory, subprocess.Popen(words, env=environment, **channels) as process:
            try:
                process.wait()
            except BaseException:
                process.terminate()  # which ends the command, too
                raise
    if process.returncode != 0:
        killed = ", killed: out of memory?" if process.returncode == 137 else ""
        raise DataError(f"{what} failed (exit {process.returncode}{killed}): {last_words(log)}; all of it in {log}")
    kilobytes = int(peak.read_text()) / (1024 if sys.platform == "darwin" else 1)
    peak.unlink()
    seconds = round(time.monotonic() - started, 2)
    found = {"command": shlex.join(command), "seconds": seconds, "peak_rss_mb": round(kilobytes / 1024)}
    return {**found, "peak_gpu_mb": max(gpu_memory)} if gpu_memory else found


def last_words(log: Path) -> str:
    """The last ``error:`` line of a log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1]


@contextmanager
def _gpu_memory() -> Iterator[list[int]]:
    """Memory in use on the visible NVIDIA GPUs (all processes, MiB) each second of the block; empty without any."""
    readings: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while (used := gpu_memory_mb()) is not None:
            readings.append(used)
            if stop.wait(_GPU_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()


def gpu_memory_mb() -> int | None:
    """Memory in use on all NVIDIA GPUs in MiB, as nvidia-smi says; None where it cannot say."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return sum(int(line) for line in answer.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
