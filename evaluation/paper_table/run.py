"""Run a cell's commands one after the other, with time and peak memory of each, and remember what is done.

A stage's record is written when its command has ended well, so a killed run starts again at the stage it was in (and
step 0 goes on inside it). What a stage read has changed: it is run again, and everything after it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from paper_table import measured
from paper_table.plan import STAGES, Cell, Options

logger = get_logger(f"FlagEmbedding.{__name__}")
_GPU_SECONDS = 1.0


def run_cell(
    options: Options, cell: Cell, keys: dict[str, str], place: str, qrels: Path | None, keep_index: bool
) -> dict[str, Any]:
    """Run the stages of ``cell`` that are not done; its record: stage -> key, command, seconds, memory.

    Args:
        place: where the cell stands among all (``3/11``), for the log.

    Raises:
        DataError: a command failed, with its own last words.
    """
    path = options.output_dir / "records" / f"{cell.id}.json"
    record = _read(path)
    for stage in keys:
        if _done(options, cell, record, keys, stage):
            continue
        _clear(options, cell, stage)
        logger.info("[%s] %s: %s", place, cell, stage)
        log = options.output_dir / "logs" / f"{cell.id}.{stage}.log"
        found = run_command(options.command(cell, stage, qrels), log, f"{cell}: {stage}")
        record[stage] = {"key": keys[stage], **found}
        write_json_atomic(path, record)
        if stage == "search" and not keep_index:
            shutil.rmtree(options.product(cell, "index").parent, ignore_errors=True)
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable record ({error}); delete it to run this cell again") from error


def _done(options: Options, cell: Cell, record: dict[str, Any], keys: dict[str, str], stage: str) -> bool:
    if record.get(stage, {}).get("key") != keys[stage]:
        return False
    # The index is thrown away once it was searched, and a model may be once it was scored.
    later = STAGES[STAGES.index(stage) + 1 :]
    used = stage != "search" and any(
        record.get(after, {}).get("key") == keys[after] and options.product(cell, after).exists() for after in later
    )
    return used or options.product(cell, stage).exists()


def _clear(options: Options, cell: Cell, stage: str) -> None:
    """Remove what an earlier run with other inputs left (step 0 sees to its own index)."""
    if stage == "train":
        shutil.rmtree(options.encoder(cell), ignore_errors=True)
    elif stage in ("search", "score"):
        options.product(cell, stage).unlink(missing_ok=True)


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
        with _GpuMemory() as gpu, subprocess.Popen(words, env=environment, **channels) as process:
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
    found: dict[str, Any] = {
        "command": shlex.join(command),
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": round(kilobytes / 1024),
    }
    if gpu.peak_mb is not None:
        found["peak_gpu_mb"] = gpu.peak_mb
    return found


def last_words(log: Path) -> str:
    """The last ``error:`` line of a log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1]


class _GpuMemory:
    """Peak memory in use on the visible NVIDIA GPUs (all processes) while the block runs; None without any."""

    def __init__(self) -> None:
        self.peak_mb: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while (used := gpu_memory_mb()) is not None:
            self.peak_mb = max(used, self.peak_mb or 0)
            if self._stop.wait(_GPU_SECONDS):
                return


def gpu_memory_mb() -> int | None:
    """Memory in use on all NVIDIA GPUs in MiB, as nvidia-smi says; None where it cannot say."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return sum(int(line) for line in answer.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
