"""The frame of every command: what a terminal without some characters and a user's mistake do to it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.errors import UsageError

@entry_point
def main():
    print("2 × 한국")
    if "fail" in sys.argv:
        raise UsageError("expected ×, got 한")

sys.exit(main())
"""


def run(encoding: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", CODE, *words], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", rb"2 \xd7 \ud55c\uad6d"), ("cp1252", b"2 \xd7 \\ud55c\\uad6d"), ("utf-8", "2 × 한국".encode())],
)
def test_a_terminal_without_a_character_does_not_end_a_command(encoding: str, expected: bytes) -> None:
    done = run(encoding)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = run("ascii", "fail")
    assert done.returncode == 2
    assert done.stderr.strip() == rb"error: expected \xd7, got \ud55c"
