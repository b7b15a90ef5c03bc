"""Tables and pages of Markdown, by hand."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.pages import of, percent, render, table
from FlagEmbedding.utils.ranks import parse_range


def test_a_table_keeps_its_cells() -> None:
    found = table(["name|s", "n"], [["a|b\nc", 12345], ["길", 0.5], ["12", 1]], numbers=[1])
    assert found.splitlines() == [
        "| name\\|s   |      n |",
        "|:----------|-------:|",
        "| a\\|b c    | 12,345 |",
        "| 길        |    0.5 |",
        "| 12        |      1 |",
    ]
    assert table(["a", "b"], []).splitlines()[0] == "| a   | b   |"


def test_shares() -> None:
    assert (percent(1, 3), percent(0, 5), percent(0, 0)) == ("33.33 %", "0.00 %", "–")
    assert of(1234, 2468) == "1,234 (50.00 %)"


def test_a_page_has_the_helpers_and_refuses_an_unknown_name(tmp_path: Path) -> None:
    template = tmp_path / "page.md"
    template.write_text("{% if more %}\n{{ of(n, 4) }} & {{ n | number }} {{ percent(n, 4) }}\n{% endif %}\n")
    assert render(template, more=True, n=1) == "1 (25.00 %) & 1 25.00 %\n"
    template.write_text("{{ absent }}")
    with pytest.raises(jinja2.UndefinedError):
        render(template)


def test_a_window_of_ranks() -> None:
    assert parse_range("2-30") == (2, 30)
    for text in ("30-2", "5-5", "5", "a-b", "-3", "2-", ""):
        with pytest.raises(UsageError, match="range_for_sampling"):
            parse_range(text)
