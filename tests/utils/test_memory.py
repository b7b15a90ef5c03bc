"""Memory kept for the next step: counted in page faults of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Rounds that allocate, touch and free 200 MB in blocks of 20, as a training step does; prints the faults of the last.
ROUNDS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages, where the system has some left, hide faults
import torch
from FlagEmbedding.utils.memory import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5_000_000) for _ in range(10)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


def rounds(word: str, **environment: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_"))}
    answer = subprocess.run(
        [sys.executable, "-c", ROUNDS, word], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, faults = answer.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    kept, faults = rounds("keep")
    assert kept == "True"
    # Left alone, glibc moves its threshold with what is freed, and what it gives back depends on where the heap begins;
    # with the threshold held where it starts, every block goes back.
    _, without = rounds("leave", MALLOC_MMAP_THRESHOLD_="131072")
    assert without > 10_000 and faults < without / 10


def test_the_environment_has_the_last_word() -> None:
    assert rounds("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
