"""The page of situations is the one that ``make situations`` would write: all of them, and none with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from situations import inputs, together, training
from situations.world import place_for

PAGE = Path(__file__).resolve().parents[2] / "docs" / "robustness.md"
KINDS = {**training.SITUATIONS, **together.SITUATIONS, **inputs.SITUATIONS}


def test_every_situation_is_on_the_page() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    named = [row[0].removeprefix("| ") for row in rows if row[0] != "| situation"]
    assert named == [situation.what.replace("|", "\\|") for kind in KINDS.values() for situation in kind]
    assert not [row for row in rows if "TRACEBACK" in row[2]]


@pytest.mark.parametrize("kind", ["Texts and files", "Judgments and indexes"])
def test_a_situation_is_refused_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    situation = next(each for each in KINDS[kind] if not each.shows)
    place = place_for(tmp_path, 1)
    situation.act(place)
    outcome = place.outcomes[-1]
    assert outcome.code == 2 and "error: " in outcome.printed and outcome.left == "as before"
