"""``python tests/fuzz [MINUTES]``: the readers in turn with new contents until the time is over, and how many of each.

What fails is shrunk and printed with its traceback and its bytes; the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "evaluation")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from tests.fuzz.contents import files  # noqa: E402
from tests.fuzz.readers import READERS  # noqa: E402
from tests.fuzz.trial import try_files  # noqa: E402

_AT_ONCE = 200


def round_of(name: str, number: int, counts: Counter[str]) -> None:
    reader = READERS[name]

    @seed(number)
    @settings(
        max_examples=_AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(files(reader))
    def check(contents: dict[str, bytes]) -> None:
        counts[try_files(reader, contents)] += 1

    check()


def main(minutes: float) -> int:
    end, number, failed = time.monotonic() + 60 * minutes, int(time.time()), set[str]()
    counts = {name: Counter[str]() for name in READERS}
    while time.monotonic() < end:
        number += 1
        for name in READERS:
            if name in failed or time.monotonic() > end:
                continue
            try:
                round_of(name, number, counts[name])
            except Exception:  # noqa: BLE001 — whatever a reader lets through is what is looked for
                failed.add(name)
                print(f"==== {name}, seed {number}\n{traceback.format_exc()}", flush=True)
    for name, found in counts.items():
        print(f"{name:24} {found.total():7} tried {found['read']:7} read {found['refused']:7} refused", flush=True)
    print(f"{sum(found.total() for found in counts.values())} tried; failed: {', '.join(sorted(failed)) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10))
