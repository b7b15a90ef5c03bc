"""Signs of life between the processes of a run: one that is killed, stopped or cut off ends the others within a minute.

A thread of each process counts up a number in the store at which all of them met, and reads the others' numbers. It
counts its own rounds, not the clock: a process that computes, reads or saves for an hour goes on counting, and a run
that is stopped and continued as a whole has lost nobody. Where a number stands still, the process behind it is named in
one line, and this one ends without waiting for a collective that will never be answered.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

import torch.distributed as dist

from FlagEmbedding.utils.distributed import is_initialized, local_rank, rank, world_size
from FlagEmbedding.utils.logging import get_logger

if TYPE_CHECKING:  # not there in a torch that was built without it
    from torch._C._distributed_c10d import Store

logger = get_logger(__name__)

INTERVAL = 2.0  # seconds between two signs
PATIENCE = 20  # signs that may be missing before a process counts as lost
IN_DOUBT = 4  # the same, once a connection broke or this process was asked to end
_DONE, _FAILED = b"done", b"failed"
_BROKEN = ("connection", "broken pipe", "socket", "peer", "timed out", "timeout", "gloo", "nccl", "store")
_groups = itertools.count()  # that this process has been in


@contextmanager
def watched(hint: str) -> Iterator[None]:
    """Inside, the loss of a process of the group ends this one with exit code 1; alone, nothing happens.

    Args:
        hint: what to do then, for the line that names the lost one.
    """
    if not is_initialized() or world_size() == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        yield
        return
    watch = _Watch(hint)
    watch.start()
    with watch.asked_to_end():
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _BROKEN):
                watch.find_out()
            watch.stop(_FAILED)
            raise
        watch.stop(_DONE)


class _Watch:
    """The threads of one process: one talks to the store, the other sees that it gets answers."""

    def __init__(self, hint: str) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.prefix = f"heartbeat/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}/{next(_groups)}"
        self.hint, self.rounds, self.patience = hint, 0, PATIENCE
        self.others = {other: b"" for other in range(world_size()) if other != rank()}
        self.missing = dict.fromkeys(self.others, 0)
        self.store: Store | None = None
        self.ended = threading.Event()

    def start(self) -> None:
        """Give signs and watch, until :meth:`stop`."""
        self.threads = [threading.Thread(target=call, daemon=True) for call in (self._beat, self._see_to_the_store)]
        for thread in self.threads:
            thread.start()

    def stop(self, last: bytes) -> None:
        """Tell the others how this process ended: they wait for no further sign."""
        self.ended.set()
        self.threads[0].join(INTERVAL)
        if self.store is not None and not self.threads[0].is_alive():
            with suppress(RuntimeError):  # the store may have gone with rank 0
                self.store.set(self._key(rank()), last.decode())
                if rank() == 0 and last == _DONE:
                    self._wait_for_the_others(self.store)

    def _wait_for_the_others(self, store: Store) -> None:
        """Rank 0 may be the one that keeps the store: the others still tell it that they are done."""
        keys = [self._key(other) for other in self.others]
        until = time.monotonic() + PATIENCE * INTERVAL
        while not {bytes(said) for said in store.multi_get(keys)} <= {_DONE, _FAILED} and time.monotonic() < until:
            time.sleep(0.02)

    @contextmanager
    def asked_to_end(self) -> Iterator[None]:
        """SIGTERM: first find out whether it comes of a lost process (torchrun sends it to the others then)."""
        here = threading.current_thread() is threading.main_thread()
        if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return

        own = os.getpid()

        def end(number: int, _: FrameType | None) -> None:
            if os.getpid() == own:  # a worker that was forked has no watch
                self.find_out()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def find_out(self) -> None:
        """Something broke: wait until the watch names who is lost and ends this process, or all have given a sign."""
        self.patience = IN_DOUBT
        time.sleep((IN_DOUBT + 4) * INTERVAL)

    def _key(self, of: int) -> str:
        return f"{self.prefix}/{of}"

    def _beat(self) -> None:
        while not self.ended.is_set():
            try:
                self._give_signs()
            except RuntimeError:  # torch's network errors, also after a run was stopped and continued as a whole
                self.ended.wait(INTERVAL)

    def _give_signs(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=PATIENCE * INTERVAL)
        # A client of its own: the group's is locked while a collective waits in it.
        self.store = store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, wait_for_workers=False, timeout=wait
        )
        while True:
            store.set(self._key(rank()), f"{self.rounds} process {os.getpid()} on {socket.gethostname()}")
            self._read(store)
            self.rounds += 1
            if self.ended.wait(INTERVAL):
                return

    def _read(self, store: Store) -> None:
        watched = [other for other, said in self.others.items() if said != _DONE]
        there = [other for other in watched if self.others[other] or store.check([self._key(other)])]
        found = store.multi_get([self._key(other) for other in there]) if there else []
        said = dict(zip(there, map(bytes, found), strict=True))
        for other in watched:
            same = said.get(other, b"") == self.others[other]
            self.missing[other] = self.missing[other] + 1 if same else 0
        self.others |= said
        failed = [other for other in watched if self.others[other] == _FAILED]
        if failed and max(self.missing[other] for other in failed) > IN_DOUBT:
            os._exit(1)  # it has said why
        lost = [other for other in watched if self.missing[other] > self.patience and other not in failed]
        if self.ended.is_set():
            return
        if not lost and store.check([f"{self.prefix}/lost"]):
            self._name("", alone=False)
        if lost:
            who = ", ".join(self._who(other) for other in lost)
            self._name(who, alone=store.add(f"{self.prefix}/lost", 1) == 1)

    def _see_to_the_store(self) -> None:
        before, same = -1, 0
        while not self.ended.wait(INTERVAL):
            same = same + 1 if self.rounds == before else 0
            before = self.rounds
            if same > self.patience + 1 and self.store is None:
                logger.warning(
                    "nothing answers at MASTER_ADDR: a lost process will not be noticed before --ddp_timeout"
                )
                return
            if same > self.patience + 1:
                self._without_store()

    def _without_store(self) -> None:
        """Under torchrun it keeps the store itself, else rank 0 does."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        who = f"torchrun on {os.environ['MASTER_ADDR']}" if agent else self._who(0)
        self._name(who, alone=rank() <= 1 or local_rank() == 0)

    def _name(self, who: str, alone: bool) -> None:
        """One line, of one of those that are left, and the end."""
        if alone:
            logger.error(
                "%s gave no sign of life for %.0f s: killed, stopped or cut off from the network; rank %d ends. %s",
                who, self.patience * INTERVAL, rank(), self.hint,
            )  # fmt: skip
            for stream in (sys.stderr, sys.stdout):
                stream.flush()
        if rank() == 0 or not alone:
            # torchrun ends all when the first one ends; without it the store goes with rank 0.
            time.sleep(2 * INTERVAL)
        os._exit(1)

    def _who(self, other: int) -> str:
        said = self.others.get(other, b"").decode(errors="replace").partition(" ")[2]
        return f"rank {other} ({said})" if said else f"rank {other}"
