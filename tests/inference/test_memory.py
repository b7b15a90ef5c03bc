"""Memory stays where it is while rows of ever new lengths go through (benchmarks/memory_step0.py: whole steps)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import psutil
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.inference.arguments import EncoderArguments
encoder = TextEncoder(EncoderArguments(encoder=sys.argv[1]))
def encode(first, last):
    # Ever new numbers of rows and tokens in a slab.
    windows = ((["a " * (i % 60)] * (i % 50 + 1) + ["b " * (i % 37)], None) for i in range(first, last))
    for _ in encoder.encode(windows, 128):
        pass
encode(0, 50)
before = psutil.Process().memory_info().rss
encode(50, 850)
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def test_new_shapes_leave_nothing_behind(tiny_model_dir: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_model_dir)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(answer.stdout) < 100
