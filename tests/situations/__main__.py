"""Every situation of docs/robustness.md again, and what comes of it: ``make situations``.

Each is made in a folder of its own and the published command is run. The table says what came of it in earlier
versions (empty for cases that were added later), and, of this run, the line that is printed, the exit code, and
what has changed on disk. It is written to docs/robustness.md. The exit code is 1 if any ends in a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "evaluation")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from situations import inputs, together, training  # noqa: E402
from situations.world import Situation, place_for, shown, tidy  # noqa: E402

ALL = {**training.SITUATIONS, **together.SITUATIONS, **inputs.SITUATIONS}
PAGE = """# What happens when something is wrong

Made by `make situations` (tests/situations), which runs every situation and prints what came of it; nothing here is
written by hand but the column "before", which is what came of it in earlier versions. Refused means exit 2 and
nothing lost.
"""


def row_of(situation: Situation, folder: Path, number: int) -> tuple[list[str], bool]:
    """A row of the table, and whether a traceback was printed."""
    place = place_for(folder, number)
    situation.act(place)
    outcome = place.outcomes[-1]
    line = shown(outcome, situation.shows, place.folder, folder)
    cells = [
        situation.what,
        situation.before or "–",
        f"`{line.replace('`', chr(39))}`",
        str(outcome.code),
        tidy(outcome.left) or "–",
    ]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells], "Traceback" in outcome.printed


def main() -> int:
    """Run them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="situations with this in their name; the page is printed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "robustness.md")
    options = parser.parse_args()
    lines, number, broken = [PAGE], 0, []
    with tempfile.TemporaryDirectory() as temporary:
        for kind, situations in ALL.items():
            rows = []
            for situation in situations:
                number += 1
                if options.only in situation.what:
                    cells, traceback = row_of(situation, Path(temporary), number)
                    rows.append(f"| {' | '.join(cells)} |")
                    broken += [situation.what] * traceback
                    print(f"{situation.what}: {cells[3]}", file=sys.stderr, flush=True)
            head = ["| situation | before | printed now | exit | on disk |", "|---|---|---|---|---|"]
            lines += ["", f"## {kind}", "", *head, *rows] if rows else []
    page = "\n".join(lines) + "\n"
    if options.only:
        print(page)
    else:
        options.output.write_text(page, encoding="utf-8")
    for what in broken:
        print(f"traceback: {what}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
