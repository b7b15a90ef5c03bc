"""One of several processes under torchrun; started by test_heartbeat.py, which kills, stops or delays one of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from FlagEmbedding.utils import heartbeat
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.distributed import barrier, rank
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.processes import processes


@entry_point
def main() -> None:
    """Meet; rank 1 then does what it is told while the others wait for it."""
    folder, what = Path(sys.argv[1]), sys.argv[2]
    heartbeat.INTERVAL, heartbeat.PATIENCE, heartbeat.IN_DOUBT = 0.25, 16, 4
    with processes():
        (folder / f"{rank()}.pid").write_text(str(os.getpid()))
        if what == "slow" and rank() == 1:
            until = time.monotonic() + 8  # twice as long as anybody is waited for
            while time.monotonic() < until:
                sum(range(100_000))
        elif what == "refused" and rank() == 1:
            raise UserError("what rank 1 says")
        elif what == "wait":
            while not (folder / "go").exists():
                time.sleep(0.05)
        barrier()


if __name__ == "__main__":
    sys.exit(main())
