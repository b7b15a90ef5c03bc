"""Is the work around shards linear? Planning's places, listing and claiming, at simulated numbers of shards.

    python benchmarks/claims.py --shards 6250 12500 25000 50000

Every shard is one that another worker has finished, or, every second one, is still to be claimed: what a worker does
that joins a run half way. Nothing is encoded. Files are written without being forced to disk, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from FlagEmbedding.indexing.claims import Claims
from FlagEmbedding.retrieval.shards import ShardStore, read_manifest


def measure(shards: int) -> list[float]:
    """Seconds for each part, at ``shards`` shards of 2,048 passages."""
    with tempfile.TemporaryDirectory() as place:
        starts = [[[number * 1_000_000, number * 2_048 + 1] for number in range(shards)]]
        store = ShardStore.create(Path(place) / "shards", {}, shards * 2_048, 1_024, 2_048, starts=starts)
        for shard in range(0, shards, 2):
            store.path(shard, "json").write_text(json.dumps({"rows": 2_048}))
        times: list[float] = []

        def timed(call: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            found = call()
            times.append(time.perf_counter() - started)
            return found

        timed(lambda: read_manifest(store.folder / "manifest.json"))
        finished = timed(store.finished)
        missing = [shard for shard in range(shards) if shard not in finished]
        assert len(missing) == shards // 2
        with Claims(store) as first, Claims(store) as second:
            assert timed(lambda: sum(1 for _ in first.unclaimed(missing))) == len(missing)
            assert timed(lambda: sum(1 for _ in second.unclaimed(missing))) == 0
        # The first one is gone without having encoded anything: all its claims are taken over.
        with Claims(store) as third:
            assert timed(lambda: sum(1 for _ in third.left_behind(missing))) == len(missing)
        timed(store.remove)
        return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[6_250, 12_500, 25_000, 50_000])
    heads = ["shards", "passages", "read plan", "list", "claim half", "meet claims", "take over half", "remove"]
    rows = []
    for shards in parser.parse_args().shards:
        times = measure(shards)
        rows.append([f"{shards:,}", f"{shards * 2_048:,}", *(f"{1e6 * each / shards:.1f} µs" for each in times)])
    print(tabulate(rows, heads, tablefmt="pipe"))
    print("\nTimes are per shard: linear work has the same in every row.")


if __name__ == "__main__":
    main()
