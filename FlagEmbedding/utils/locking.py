"""One process at a time: a lock file that says who holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import PathLike


@contextmanager
def exclusive(path: Path, what: PathLike) -> Iterator[None]:
    """Hold the lock file ``path``, which goes at the end. A kill leaves the file, but nobody holding it.

    Raises:
        UsageError: another process holds it; ``what`` is what both want to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    holder = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        lock.acquire()
    except Timeout as error:
        who = f"another process ({holder.strip() or 'unknown'})"
        raise UsageError(f"{what}: {who} is writing to it; wait for it, or end it first") from error
    try:
        path.write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever has it open finds it gone once the lock is theirs, and makes a new one.
        path.unlink(missing_ok=True)
        lock.release()
