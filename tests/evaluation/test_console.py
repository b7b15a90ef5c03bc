"""Every command answers --help and refuses a wrong flag on a terminal that has ASCII alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = [
    ["evaluation/step0-generate_embedding.py"],
    ["evaluation/step1-search_results.py"],
    ["evaluation/step2-eval_dense_mldr.py"],
    ["evaluation/reproduce_table.py"],
    ["run.py"],
    ["-m", "FlagEmbedding.evaluation"],
    ["-m", "FlagEmbedding.evaluation", "compare"],
    ["-m", "FlagEmbedding.evaluation.compare"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_refusal_in_ascii(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for word, code in (("--help", 0), ("--nicht×da", 2)):
        answer = subprocess.run(
            [sys.executable, *command, word], cwd=REPOSITORY, capture_output=True, check=False, env=environment
        )
        assert answer.returncode == code, answer.stderr
        text = (answer.stdout if code == 0 else answer.stderr).decode("ascii")
        assert "Traceback" not in text
        assert len(text) > 20
