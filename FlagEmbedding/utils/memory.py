"""Memory that a training step frees, kept for the next step."""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST = 32 << 20  # the greatest threshold that glibc takes


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed instead of giving it back to the system; False where there is no glibc.

    A step's activations are as large as the step's before. Given back, every page of them is handed out, cleared and
    mapped again in every step: on a virtual machine a tenth of the time of training on a CPU. The peak does not change;
    what is lost is that memory shrinks between the peaks. Blocks over 32 MB are beyond what glibc can be asked to keep.
    With ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` in the environment, those hold and nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, -1))
