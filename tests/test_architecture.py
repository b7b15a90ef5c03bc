"""The layout tells the story: imports go down only, libraries stay in their room, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "FlagEmbedding"

# What each room may import from the package, besides itself, `schema` and `utils`.
MAY_IMPORT = {
    "utils": set(),
    "schema": set(),
    "modeling": set(),
    "losses": set(),
    "retrieval": set(),
    "collections": set(),
    "demo": set(),
    "inference": {"modeling"},
    "finetune": {"modeling", "losses", "mining"},  # mining: negatives mined again between epochs
    "indexing": {"inference", "retrieval", "collections"},
    "mining": {"inference", "retrieval", "collections", "indexing", "modeling"},
    "evaluation": {"inference", "retrieval", "collections", "indexing"},
}
# Libraries that one room alone may touch.
ALONE = {"faiss": "retrieval", "openai": "mining", "ir_measures": "evaluation", "pytrec_eval": "evaluation"}
# Files and functions over the house limits, each with its reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "remote_code" in path.parts, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the package's face names its public classes
    assert room in MAY_IMPORT, f"a new room {room!r}: give it a line in MAY_IMPORT"
    allowed = MAY_IMPORT[room] | {room, "schema", "utils", "__version__"}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("FlagEmbedding.")}
    assert used <= allowed, f"{path.relative_to(REPOSITORY)} may not import {sorted(used - allowed)}"


@pytest.mark.parametrize(("library", "room"), ALONE.items())
def test_a_library_stays_in_its_room(library: str, room: str) -> None:
    users = {room_of(p) for p in modules() if any(name.split(".")[0] == library for name in imports(p))}
    assert users <= {room}


def test_the_trainer_is_used_in_finetune_alone() -> None:
    users = {room_of(p) for p in modules() if "transformers.Trainer" in imports(p)}
    assert users == {"finetune"}


def own_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [str(p.relative_to(REPOSITORY)) for p in REPOSITORY.rglob("*.py")]
    return [REPOSITORY / name for name in names if ".venv" not in name and (REPOSITORY / name).is_file()]


def test_files_and_functions_stay_small() -> None:
    for path in own_files():
        name = str(path.relative_to(REPOSITORY))
        text = path.read_text("utf-8")
        assert name in LONG_FILES or text.count("\n") <= 400, f"{name}: over 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                docstring = ast.get_docstring(node, clean=False) or ""
                length -= docstring.count("\n") + 1 if docstring else 0
                where = f"{name}:{node.name}"
                assert where in LONG_FUNCTIONS or length <= 80, f"{where}: {length} lines"


@pytest.mark.parametrize("script", ["run.py", *(p.name for p in (REPOSITORY / "evaluation").glob("step*.py"))])
def test_entry_scripts_stay_thin(script: str) -> None:
    path = REPOSITORY / script if script == "run.py" else REPOSITORY / "evaluation" / script
    assert path.read_text("utf-8").count("\n") <= 50


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "transformers", "datasets", "faiss")
    code = f"import sys, FlagEmbedding; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
