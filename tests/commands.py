"""Published commands run inside the process of the test: what a script prints, logs and returns, torch imported once.

Where a test is about processes (signals, ranks, what is imported), it starts one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess

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
