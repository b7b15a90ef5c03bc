"""Which worker encodes which shard, where workers share nothing but a disk: claim files in ``shards/claims``.

    000007              taken: whoever creates it first (``O_EXCL``) encodes shard 7; holds the worker's name
    host-4711-8a3f….alive   a worker's sign of life, touched every few seconds

Ages are differences between times that the disk itself gave, so that the clocks of machines need not agree. A claim is
taken over when its worker is dead (no sign of life for a minute, or no such process on this machine), or slow: nothing
else is left to do and the claim is old. A shard that two encode after all has the same bytes from both; claims save
work, and nothing depends on them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from FlagEmbedding.retrieval.shards import CLAIMS, ShardStore, clear_disk_errors
from FlagEmbedding.utils.errors import UsageError

INTERVAL = 5.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one, after which a worker counts as dead
SLOW = 5  # a claim is old after this many times the longest that a shard has taken here (and PATIENCE)
_ALIVE = ".alive"


class Claims:
    """The claims of one worker on the shards of ``store``; inside ``with`` it gives signs of life."""

    def __init__(self, store: ShardStore) -> None:
        self.store, self.folder = store, store.folder / CLAIMS
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._sign = self.folder / f"{self.name}{_ALIVE}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.longest = 0.0  # seconds between two shards of this worker

    def __enter__(self) -> Claims:
        with clear_disk_errors(f"claiming shards in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sign.touch()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._sign.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL):
            with suppress(OSError):  # the disk may be back at the next sign; the work itself says what is wrong
                os.utime(self._sign)

    def unclaimed(self, shards: Iterable[int]) -> Iterator[int]:
        """Those that nobody has taken, each taken as it is asked for."""
        return (shard for shard in shards if self._take(shard))

    def left_behind(self, shards: Iterable[int]) -> Iterator[int]:
        """Those of workers that are dead or slow, each taken over as it is asked for."""
        living: dict[str, bool] = {}
        for shard in shards:
            if self.store.path(shard, "json").exists():
                continue
            path = self.folder / f"{shard:06d}"
            try:
                owner = path.read_text(encoding="utf-8")
                age = self._age(path)
            except OSError:  # just taken over by another
                continue
            if owner not in living:
                living[owner] = owner != self.name and self._lives(owner)
            if not owner and age <= PATIENCE:  # being written
                continue
            old = age > max(PATIENCE, SLOW * self.longest)
            if (not living[owner] or old) and self._take_over(path, owner) and self._take(shard):
                yield shard

    def _take(self, shard: int) -> bool:
        with clear_disk_errors(f"claiming shard {shard} in {self.folder}"):
            try:
                handle = os.open(self.folder / f"{shard:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(self.name)
        return True

    def _take_over(self, path: Path, owner: str) -> bool:
        """Remove a claim, unless another has been faster: only one can rename it away."""
        aside = path.with_name(f"{path.name}.{self.name}")
        with suppress(OSError):
            os.rename(path, aside)
            mine = aside.read_text(encoding="utf-8") == owner
            aside.unlink()
            return mine
        return False

    def _lives(self, owner: str) -> bool:
        if not owner or _is_gone(owner):
            return False
        try:
            return self._age(self.folder / f"{owner}{_ALIVE}") <= PATIENCE
        except FileNotFoundError:
            return False

    def _age(self, path: Path) -> float:
        """Seconds between the last change of ``path`` and now, both by the disk's clock."""
        os.utime(self._sign)
        return self._sign.stat().st_mtime - path.stat().st_mtime


def _is_gone(owner: str) -> bool:
    """Whether the worker was a process of this machine that runs no more."""
    host, pid, _ = owner.rsplit("-", 2)
    if host != socket.gethostname() or os.name == "nt":  # where signal 0 is not a question
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def check_nobody_works(store: ShardStore) -> None:
    """Refuse to go on where workers (``--shards``) are encoding; signs of life of the dead are waited out.

    Raises:
        UsageError: one gave a sign while this looked.
    """
    first: dict[Path, float] = {}
    until = time.monotonic() + PATIENCE
    while living := [
        path for path in (store.folder / CLAIMS).glob(f"*{_ALIVE}") if not _is_gone(path.name.removesuffix(_ALIVE))
    ]:
        for path in living:
            with suppress(FileNotFoundError):
                if first.setdefault(path, path.stat().st_mtime) != path.stat().st_mtime:
                    raise UsageError(
                        f"{store.folder}: worker {path.stem} is encoding (--shards); wait for it or end it, or join in "
                        "with --shards"
                    )
        if time.monotonic() > until:
            return
        time.sleep(INTERVAL / 2)
