"""One process at a time: a lock file that says who holds it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


@contextmanager
def exclusive(path: Path, what: PathLike, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which goes at the end. A kill leaves the file, but nobody holding it.

    Who holds it stands in a file beside it, since no other process may read a locked file on Windows.

    Args:
        wait: until nobody else holds it, instead of refusing.

    Raises:
        UsageError: another process holds it; ``what`` is what both want to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_name(f"{path.name}.holder")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        name = holder.read_text(encoding="utf-8", errors="replace").strip() if holder.exists() else ""
        who = f"another process ({name or 'unknown'})"
        if not wait:
            raise UsageError(f"{what}: {who} is writing to it; wait for it, or end it first") from error
        logger.info("%s: waiting for %s", what, who)
        lock.acquire(timeout=-1)
    try:
        holder.write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever has it open finds it gone once the lock is theirs, and makes a new one.
        # (Windows removes no open file; there it stays, held by nobody.)
        for own in (holder, path):
            with suppress(OSError):
                own.unlink()
        lock.release()
