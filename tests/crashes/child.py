"""One start of a command: ``child.py LOG MOST_BYTES words…``, or :func:`run` in a forked process."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path


def run(words: list[str], log: str, most_bytes: int) -> None:
    """What ``python words…`` does, both outputs to ``log``; no file grows beyond ``most_bytes`` (0: no limit)."""
    os.setsid()
    os.chdir(Path(__file__).resolve().parents[2])
    # The log is a pipe's end, so that the limit on files does not hold for it.
    reader, writer = os.pipe()
    subprocess.Popen(["tee", "-a", log], stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    os.close(reader)
    os.close(writer)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[3:], sys.argv[1], int(sys.argv[2]))
