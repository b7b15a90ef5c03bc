"""Processes of one run: who am I, and gathering rows with the right gradient.

Nothing here starts a process group: the launcher (torchrun, accelerate) and the HF Trainer do. In a single
process every function is the identity.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from FlagEmbedding.utils.errors import UsageError

# torch 2.13 renamed it and warns about the older name.
_all_gather: Callable[[Tensor, Tensor], Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_initialized() -> bool:
    """True inside a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; before the group exists, the launcher's word (RANK)."""
    return dist.get_rank() if is_initialized() else _said("RANK", 0)


def world_size() -> int:
    """Number of processes; before the group exists, the launcher's word (WORLD_SIZE)."""
    return dist.get_world_size() if is_initialized() else _said("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine."""
    return _said("LOCAL_RANK", 0)


def _said(name: str, otherwise: int) -> int:
    """A number of the launcher's environment."""
    value = os.environ.get(name, "").strip() or str(otherwise)
    if not value.isdigit():
        raise UsageError(f"{name}={value} in the environment: expected a number; start several processes with torchrun")
    return int(value)


def check_launcher() -> None:
    """Refuse an environment that tells of several processes, and not where they meet or which this one is."""
    own, world = rank(), world_size()
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and absent and not is_initialized():
        raise UsageError(
            f"the environment says WORLD_SIZE={world}, and nothing of {' or '.join(absent)}: start with torchrun, or "
            "set these too; for a single process unset WORLD_SIZE"
        )
    if own >= world:
        raise UsageError(f"the environment says RANK={own} of WORLD_SIZE={world}: ranks count from 0")


def is_main() -> bool:
    """True on rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if is_initialized():
        dist.barrier()


def leave() -> None:
    """End the process group, if there is one; call it where no DDP wrapper is in use any more.

    A DDP wrapper that outlives its group takes it down with Python's lock held, while gloo's thread may be waiting for
    that very lock: the process hangs at exit (torch 2.13). So wrappers go first, those in reference cycles (the
    Trainer's) too.
    """
    if is_initialized():
        gc.collect()
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """Every process's ``value``, in rank order, on every process."""
    if not is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Every process's numbers, in rank order, by one collective; a device waits for them once."""
    own = torch.tensor(counts, dtype=torch.int64, device=device)
    every = own.new_empty(dist.get_world_size() * len(own))
    _all_gather(every, own)
    return every.view(-1, len(own)).tolist()


def all_gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Rows of every process, end to end in rank order: ``[n_r, …]`` on rank r to ``[sum n_r, …]``.

    Processes may hold different numbers of rows. Other processes' rows arrive as constants; the own slice keeps
    its gradient, multiplied by the world size: each process then differentiates the loss of the whole gathered
    batch with respect to its own rows, and the mean that DDP takes over processes is exactly the gradient of
    one process holding the whole batch (without the factor it would be 1/world of it).

    Args:
        rows: this process's.
        sizes: how many rows each process has, if that is known; otherwise a collective of its own asks.
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return rows
    world, me = dist.get_world_size(), dist.get_rank()
    rows = rows.contiguous()
    if sizes is None:
        sizes = [own for (own,) in gather_counts([rows.shape[0]], rows.device)]
    most = max(sizes)
    # all_gather wants equal shapes, so every process sends as many rows as the fullest one.
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    together = padded.new_empty((world, *padded.shape))
    _all_gather(together.flatten(0, 1), padded)
    gathered = [part[:size] for part, size in zip(together, sizes, strict=True)]
    gathered[me] = rows
    if rows.requires_grad and torch.is_grad_enabled():
        gathered[me] = rows.view_as(rows)
        gathered[me].register_hook(lambda gradient: gradient * world)
    return torch.cat(gathered)
