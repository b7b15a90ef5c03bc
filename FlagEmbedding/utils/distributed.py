"""Processes of one run: who am I, and gathering rows with the right gradient.

Nothing here starts a process group: the launcher (torchrun, accelerate) and the HF Trainer do. In a single
process every function is the identity.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    """True inside a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; before the group exists, the launcher's word (RANK)."""
    return dist.get_rank() if is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; before the group exists, the launcher's word (WORLD_SIZE)."""
    return dist.get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


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


def all_gather_rows(rows: Tensor, scale_gradient: bool = True) -> Tensor:
    """Rows of every process, end to end in rank order: ``[n_r, …]`` on rank r to ``[sum n_r, …]``.

    Processes may hold different numbers of rows. Other processes' rows arrive as constants; the own slice keeps
    its gradient, multiplied by the world size: each process then differentiates the loss of the whole gathered
    batch with respect to its own rows, and the mean that DDP takes over processes is exactly the gradient of
    one process holding the whole batch (without the factor it would be 1/world of it).
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return rows
    world, me = dist.get_world_size(), dist.get_rank()
    rows = rows.contiguous()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device))
    sizes = [int(count) for count in counts]
    most = max(sizes)
    # all_gather wants equal shapes, so every process sends as many rows as the fullest one.
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    gathered = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    gathered[me] = rows
    if scale_gradient and rows.requires_grad and torch.is_grad_enabled():
        gathered[me] = rows.view_as(rows)
        gathered[me].register_hook(lambda gradient: gradient * world)  # type: ignore[no-untyped-call]
    return torch.cat(gathered)
