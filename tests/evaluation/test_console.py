"""On a terminal of few characters every command answers --help, refuses a wrong flag, and step 2 loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.runs import NAME, PUBLISHED, REPOSITORY

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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_characters_loses_nothing(work: Path, encoding: str) -> None:
    script = REPOSITORY / "evaluation" / "step2-eval_dense_mldr.py"
    words = [*PUBLISHED.split(), "--encoder", "base", NAME, "--compare", "--data_dir", "data", "--resamples", "100"]
    answer = subprocess.run(
        [sys.executable, str(script), *words], cwd=work, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    printed = answer.stdout.decode(encoding)
    assert ("scores \\xd7 100" if encoding == "ascii" else "scores × 100") in printed
    assert "\\uc9c8\\ubb38 0" in printed  # 질문 0
    page = (work / f"eval_results/base_vs_{NAME}/comparison.md").read_text(encoding="utf-8")
    assert "Scores × 100" in page
    assert "질문 0" in page
