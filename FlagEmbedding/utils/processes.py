"""The processes of an evaluation or mining step: start torch.distributed under torchrun, let one decide for all.

Only small objects and barriers cross between processes, so gloo serves on every device. Waiting may take as long as
the slowest process encodes, hence the long timeout; a process that is lost is noticed all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from FlagEmbedding.utils.distributed import check_launcher, is_main, world_size
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.heartbeat import watched

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes that torchrun started know each other; alone, nothing happens."""
    mine = world_size() > 1 and not dist.is_initialized()
    if mine:
        check_launcher()
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        with watched("What was finished is kept: the same command goes on") if mine else nullcontext():
            yield
    finally:
        if mine:
            dist.destroy_process_group()


def on_main(call: Callable[[], T]) -> T:
    """``call`` on the main process, its value on all. A ``UserError`` ends all of them; the main one says why."""
    if world_size() == 1 or not dist.is_initialized():
        return call()
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(call(), None)]
        except UserError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    value, refusal = outcome[0]
    if refusal is not None:
        if is_main():
            raise refusal
        sys.exit(2)
    return value  # type: ignore[return-value]
