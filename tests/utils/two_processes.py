"""What each of two processes sees; started by test_processes.py through torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.distributed import all_gather_rows, barrier, gather_objects, is_main, rank, world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.processes import on_main, processes


def gathered() -> dict[str, object]:
    """Uneven rows of both processes, and the gradient of the sum of squares of all."""
    rows = torch.arange(1.0, 1 + 2 * (rank() + 1)).reshape(-1, 2).requires_grad_()
    found = {}
    for scaled in (True, False):
        rows.grad = None
        everything = all_gather_rows(rows, scale_gradient=scaled)
        (everything**2).sum().backward()
        found[str(scaled)] = [everything.tolist(), rows.grad.tolist()]
    return found


def refuse() -> None:
    """A mistake that the main process finds."""
    raise UsageError("one line")


@entry_point
def main() -> None:
    """Write what is seen beside the other's, then be refused together."""
    calls: list[int] = []
    with processes():
        value = on_main(lambda: calls.append(rank()) or {"from": rank()})
        seen = {
            "rank": rank(), "world": world_size(), "main": is_main(), "calls": calls, "value": value,
            "objects": gather_objects(("of", rank())), "gathered": gathered(),
        }  # fmt: skip
        (Path(sys.argv[1]) / f"{rank()}.json").write_text(json.dumps(seen))
        barrier()
        on_main(refuse)
    raise AssertionError("nobody goes on after a refusal")


sys.exit(main())
