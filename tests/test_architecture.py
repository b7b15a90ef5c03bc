"""The layout tells the story: imports go down only, libraries stay in their room, files and functions stay small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "FlagEmbedding"

# What each room may import from the package, besides itself, `schema`, `row_counts` and `utils`.
MAY_IMPORT = {
    "utils": set(),
    "schema": set(),
    "row_counts": set(),
    "modeling": set(),
    "losses": set(),
    "retrieval": set(),
    "collections": set(),
    "demo": set(),
    "inference": {"modeling"},
    "finetune": {"modeling", "losses"},
    "indexing": {"inference", "retrieval", "collections"},
    "mining": {"inference", "retrieval", "collections", "indexing", "modeling"},
    "evaluation": {"inference", "retrieval", "collections", "indexing"},
    "merge": {"modeling", "inference", "evaluation"},
    "export": {"modeling", "inference", "collections", "evaluation", "retrieval"},
}
# The same between the subrooms of mining; files beside them may use all that is in `common`.
MINING_MAY_IMPORT = {
    "common": {"common"},
    "hard_negatives": {"common", "hard_negatives"},
    "query_generation": {"common", "query_generation"},
    "doctor": {"common", "doctor"},
    "from_corpus": {"common", "hard_negatives", "query_generation", "from_corpus"},  # a chain over the others
}
# And between those of finetune, where the files beside them may use all, and each may use those.
FINETUNE_MAY_IMPORT = {
    "data": {"data"},
    "resume": {"resume", "data"},
    "dev": {"dev", "resume", "data"},
    "report": {"report", "dev", "data"},
}
# One file's leave to import from a room that is closed to the rest of its own.
FILE_MAY_IMPORT = {
    "finetune/guide.py": {"inference"},  # a frozen model beside the one that is trained
    "finetune/refresh.py": {"mining"},  # negatives mined again between epochs
    # Evaluation while training goes by the measures of steps 0 to 2; evaluation itself knows no training.
    "finetune/dev/arguments.py": {"evaluation"},  # to read the names of measures
    "finetune/dev/evaluation.py": {"evaluation", "inference", "collections"},
    "finetune/dev/trainer.py": {"evaluation"},
    "finetune/dev/held_out.py": {"collections"},
    # The report draws and writes figures as evaluation does; imported when a run ends.
    "finetune/report/run_report.py": {"evaluation"},
    "finetune/dev/page.py": {"evaluation"},
    "finetune/report/widths.py": {"evaluation"},
    "finetune/report/plots.py": {"evaluation"},
    "finetune/report/card.py": {"evaluation"},
    "indexing/ray.py": {"evaluation"},  # the flags of step 0
    "mining/__main__.py": {"finetune"},  # the page of all data commands names check_data
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
    """Dotted names imported anywhere in a file: also inside functions, under TYPE_CHECKING, and by a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "remote_code" in path.parts, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and str(node.value) in FILES:
            found.add(str(node.value))  # for importlib.import_module or runpy.run_module
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(path): path for path in modules()}


def files_behind(name: str) -> set[str]:
    """The file that an imported dotted name lies in, and the packages around it, which are imported first."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(2, len(parts) + 1)} & set(FILES)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the package's face names its public classes
    assert room in MAY_IMPORT, f"a new room {room!r}: give it a line in MAY_IMPORT"
    allowed = MAY_IMPORT[room] | {room, "schema", "row_counts", "utils", "__version__"}
    allowed |= FILE_MAY_IMPORT.get(str(path.relative_to(PACKAGE)), set())
    used = {name.split(".")[1] for name in imports(path) if name.startswith("FlagEmbedding.")}
    assert used <= allowed, f"{path.relative_to(REPOSITORY)} may not import {sorted(used - allowed)}"


def test_the_commands_of_mining_do_not_know_each_other() -> None:
    subrooms = {folder.name for folder in (PACKAGE / "mining").iterdir() if (folder / "__init__.py").is_file()}
    assert subrooms == set(MINING_MAY_IMPORT), "a new subroom: give it a line in MINING_MAY_IMPORT"
    for path in modules():
        room, *rest = path.relative_to(PACKAGE).parts
        if room != "mining" or rest == ["__main__.py"]:  # the page that names every command
            continue
        allowed = MINING_MAY_IMPORT[rest[0]] if len(rest) > 1 else {"common"}
        names = {name.split(".")[2] for name in imports(path) if name.startswith("FlagEmbedding.mining.")}
        assert names <= allowed, f"{path.relative_to(REPOSITORY)} may not import mining's {sorted(names - allowed)}"


def test_the_parts_of_training_are_in_one_order() -> None:
    subrooms = {folder.name for folder in (PACKAGE / "finetune").iterdir() if (folder / "__init__.py").is_file()}
    assert subrooms == set(FINETUNE_MAY_IMPORT), "a new subroom: give it a line in FINETUNE_MAY_IMPORT"
    for path in modules():
        room, *rest = path.relative_to(PACKAGE).parts
        if room == "finetune" and len(rest) > 1:
            used = {name.split(".")[2] for name in imports(path) if name.startswith("FlagEmbedding.finetune.")}
            names = used & subrooms - FINETUNE_MAY_IMPORT[rest[0]]
            assert not names, f"{path.relative_to(REPOSITORY)} may not import finetune's {sorted(names)}"


def test_no_circle_between_files() -> None:
    """A file never comes back to itself, whichever way an import is written, and wherever it stands."""
    graph = TopologicalSorter[str]()
    for name, path in FILES.items():
        if name == "FlagEmbedding":
            continue  # the package's face; what it imports, it imports when asked
        behind = set().union(*(files_behind(used) for used in imports(path)))
        graph.add(name, *(behind - {name} - set(packages_around(name))))
    try:
        graph.prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def packages_around(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


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


def loaded(code: str) -> set[str]:
    """Names of all modules that are there once ``code`` has run in a fresh interpreter."""
    code = f"{code}\nimport sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not loaded("import FlagEmbedding") & {"torch", "transformers", "datasets", "faiss"}


def test_options_are_light() -> None:
    """``--help`` and a mistyped flag are answered without torch: no module of options brings it."""
    names = [name for name in FILES if name.endswith(".arguments") and ".finetune." not in name]
    names += ["FlagEmbedding.mining.common.options", "FlagEmbedding.modeling.options", "FlagEmbedding.utils.cli"]
    assert {"FlagEmbedding.inference.arguments", "FlagEmbedding.mining.hard_negatives.arguments"} < set(names)
    there = loaded("import " + ", ".join(names))
    assert set(names) <= there
    assert not there & {"torch", "transformers", "datasets", "faiss"}


def test_plain_training_imports_nothing_of_mining_or_evaluation() -> None:
    """What ``run.py`` loads, and the check of its options; mining comes with ``finetune.refresh``, evaluation with
    ``finetune.dev.evaluation`` alone."""
    there = loaded(
        "from FlagEmbedding.finetune import __main__, checks, parsing, runner\n"
        "words = '--model_name_or_path m --train_data d --output_dir /nowhere --report_to none'.split()\n"
        "checks.check_arguments(parsing.parse_arguments(words))"
    )
    assert "FlagEmbedding.finetune.trainer" in there and "FlagEmbedding.finetune.refresh" not in there
    for room in ("mining", "inference", "retrieval", "indexing", "evaluation", "collections"):
        assert not [name for name in there if name.startswith(f"FlagEmbedding.{room}")]
    assert "FlagEmbedding.mining.hard_negatives.refresh" in loaded("import FlagEmbedding.finetune.refresh")
