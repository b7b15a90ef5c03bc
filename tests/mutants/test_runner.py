"""The runner of planted faults, on a repository of one function built here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RUNNER = Path(__file__).with_name("__main__.py")
CODE = "def halve(x):\n    return x / 2\n\n\ndef name():\n    return 'half'\n"
TEST = "import small\n\n\ndef test_halve():\n    assert small.halve(4) == 2\n"


def entry(name: str, old: str, new: str, test: str = "test_small.py", **more: str) -> dict[str, object]:
    return {"name": name, "file": "small.py", "old": old, "new": new, "tests": [f"tests/{test}"], **more}


def run(repository: Path, entries: list[dict[str, object]], *options: str) -> tuple[int, list[str]]:
    (repository / "tests/mutants/small.yaml").write_text(yaml.safe_dump(entries))
    done = subprocess.run(
        [sys.executable, str(RUNNER), "small", "--output", str(repository / "table.md"), *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_every_entry_fits_the_code() -> None:
    """A fault whose text is gone plants nothing: it must follow the code when that changes."""
    spec = importlib.util.spec_from_file_location("mutants_runner", RUNNER)
    assert spec is not None and spec.loader is not None
    runner = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    root = RUNNER.parents[2]
    faults = runner.read_faults(root, "all")
    assert [f"{f.room}: {f.name}: {why}" for f in faults if (why := runner.cannot_plant(root, f))] == []
    tests = {(fault.name, test.partition("::")[0]) for fault in faults for test in fault.tests}
    assert [(name, test) for name, test in tests if not (root / test).is_file()] == []


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "tests/mutants").mkdir(parents=True)
    (tmp_path / "small.py").write_text(CODE)
    (tmp_path / "tests/test_small.py").write_text(TEST)
    (tmp_path / "tests/test_red.py").write_text("def test_red():\n    assert False\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def test_every_outcome_has_its_word(repository: Path) -> None:
    code, lines = run(
        repository,
        [
            entry("noticed", "x / 2", "x * 2"),
            entry("not noticed", "'half'", "'third'"),
            entry("cannot be noticed", "x / 2", "x * 0.5", equivalent="the same number"),
            entry("not unique", "return", "yield"),
            entry("red before", "x / 2", "x", test="test_red.py"),
        ],
    )
    words = {line.split(": ")[1].split("  [")[0]: line.split()[0] for line in lines[:-1]}
    assert words == {
        "noticed": "killed",
        "not noticed": "survived",
        "cannot be noticed": "equivalent",
        "not unique": "broken",
        "red before": "broken",
    }
    assert lines[-1].startswith("25.0% killed") and code == 1
    assert (repository / "small.py").read_text() == CODE
    assert "| small | not noticed | survived |" in (repository / "table.md").read_text()


def test_all_killed_is_success(repository: Path) -> None:
    code, lines = run(repository, [entry("noticed", "x / 2", "x * 2")], "--no-fork")
    assert code == 0 and lines[-1] == "100.0% killed: 1 killed"
