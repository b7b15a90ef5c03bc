"""Every option of a command acts: set another value on the command line, and something that was built must differ.

A test of a command names the options classes, one ``Case`` for every field, and a function that builds from a command
line what the command builds and says what it is (drawn examples, losses, file names, vectors: anything that compares
with ``==``). A field that cannot differ in a test stands in ``exempt`` with the reason::

    CASES = {"shuffle_ratio": Case("--shuffle_ratio 1.0"), "colbert_dim": Case("--colbert_dim 8", given="--unified y")}
    EXEMPT = {"overwrite_output_dir": "accepted from older scripts, does nothing"}

    def test_no_field_is_left_out() -> None:
        assert_complete((DataArguments, ModelArguments), CASES, EXEMPT)

    @pytest.mark.parametrize("name", CASES)
    def test_every_option_acts(name: str) -> None:
        assert_acts(CASES[name], observe)
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Case:
    """Another value of one option.

    Attributes:
        words: the option as written on a command line, with another value than the default.
        given: what else is said in both runs, so that the option can act.
        only: the parts of what was observed that must differ; empty: any part.
    """

    words: str
    given: str = ""
    only: tuple[str, ...] = ()


def flag_fields(classes: Iterable[type[Any]]) -> set[str]:
    """Names of all fields that a flag sets (fields of ``utils.cli.internal`` have none)."""
    return {f.name for kind in classes for f in fields(kind) if f.init and f.metadata.get("cmd", True)}


def assert_complete(classes: Iterable[type[Any]], cases: Collection[str], exempt: Mapping[str, str]) -> None:
    """Every field is walked or exempt with a reason, none is both, and nothing else is named."""
    every = flag_fields(classes)
    walked = set(cases)
    assert not walked & set(exempt), f"walked and exempt: {sorted(walked & set(exempt))}"
    assert every == walked | set(exempt), (
        f"nobody looks whether these act: {sorted(every - walked - set(exempt))}; "
        f"no such field: {sorted((walked | set(exempt)) - every)}"
    )
    assert all(reason.strip() for reason in exempt.values())


def assert_acts(case: Case, observe: Callable[[list[str]], Mapping[str, Any]]) -> None:
    """What ``observe`` sees without and with the option differs, in each part of ``case.only`` where that is given."""
    given = shlex.split(case.given)
    without, with_it = observe(given), observe([*given, *shlex.split(case.words)])
    assert without.keys() == with_it.keys(), "observe must name the same parts in both runs"
    differing = {part for part in without if without[part] != with_it[part]}
    assert differing, f"{case.words}: nothing that was built differs"
    assert set(case.only) <= differing, f"{case.words}: {sorted(set(case.only) - differing)} stay as they were"
