"""Published commands run inside the process of the test: what a script prints, logs and returns, torch imported once.

Where a test is about processes (signals, ranks, what is imported), it starts one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from FlagEmbedding.utils.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = {
    0: "evaluation/step0-generate_embedding.py",
    1: "evaluation/step1-search_results.py",
    2: "evaluation/step2-eval_dense_mldr.py",
}


def run_script(script: str, words: Sequence[object]) -> CompletedProcess[str]:
    """Run ``script`` (its path in the repository) as ``python script words…`` would be run.

    An exception that is not an exit goes through to the test: in a process it would be a traceback.
    """
    argv = [str(REPOSITORY / script), *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _own_state(argv):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
    assert isinstance(code, int)
    return CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def run_command_here(command: list[str], log: Path, what: str) -> dict[str, Any]:
    """In place of ``FlagEmbedding.utils.commands.run_command``: the real command, in this process."""
    if command[1] == "-m":
        command = [command[0], str(REPOSITORY / command[2].replace(".", "/") / "__main__.py"), *command[3:]]
    answer = run_script(str(Path(command[1]).relative_to(REPOSITORY)), command[2:])
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1]
        raise DataError(f"{what} failed (exit {answer.returncode}): {last}; all of it in {log}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"command": " ".join(command), "seconds": 1.0, "peak_rss_mb": peak}


def run_together(
    script: str, words: Sequence[object], environment: Mapping[str, str], count: int = 2, seconds: float = 300
) -> CompletedProcess[str]:
    """Run ``script`` in ``count`` processes, told of each other as torchrun tells them, from one that has torch loaded.

    Torchrun itself is left out: two seconds of imports in each of three processes. Exit code 1 where one failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["FlagEmbedding.finetune.runner", "FlagEmbedding.indexing.encoding", "faiss"])
    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port, folder = str(free.getsockname()[1]), Path(name)
        free.close()
        argv, processes = [str(REPOSITORY / script), *map(str, words)], []
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            told = {**environment, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(context.Process(target=_as_script, args=(argv, told, str(folder / str(rank)))))
            processes[-1].start()
        until = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode for process in processes):
                until = min(until, time.monotonic() + 60)  # the others are to notice
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
        out, err = (
            "".join(Path(f"{folder / str(r)}.{e}").read_text("utf-8") for r in range(count)) for e in ("out", "err")
        )
    return CompletedProcess(argv, int(any(process.exitcode for process in processes)), out, err)


def _as_script(argv: list[str], environment: dict[str, str], log: str) -> None:
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{ending}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


@contextlib.contextmanager
def _own_state(argv: list[str]) -> Iterator[None]:
    """What a process of its own would have: words, import path, environment, and logging that nobody has set up."""
    root, package = logging.getLogger(), logging.getLogger("FlagEmbedding")
    before = sys.argv, sys.path, root.handlers, package.level, dict(os.environ)
    sys.argv, sys.path, root.handlers = argv, [*sys.path], []
    try:
        yield
    finally:
        sys.argv, sys.path, root.handlers = before[:3]
        package.setLevel(before[3])
        os.environ.clear()
        os.environ.update(before[4])
