"""A short round of the fuzz, the same examples each time; ``make fuzz`` goes on for minutes with new ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.contents import files, packed
from tests.fuzz.readers import READERS
from tests.fuzz.trial import try_files


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_rows_or_one_error(name: str) -> None:
    reader = READERS[name]
    outcomes = set()

    @settings(
        max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(files(reader))
    def check(contents: dict[str, bytes]) -> None:
        outcomes.add(try_files(reader, contents))

    check()
    assert "refused" in outcomes or name in ("journal", "answer cache")


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(name: str) -> None:
    reader = READERS[name]
    contents = dict(zip(reader.names, reader.seeds[0], strict=True))
    assert try_files(reader, {file: packed(file, content) for file, content in contents.items()}) == "read"
