"""Plant faults one by one and see whether the tests notice: ``make mutants ROOM=losses`` (or ``ROOM=all``).

Each ``tests/mutants/<room>.yaml`` lists faults somebody could really make, with the tests that should notice each:

    - name: loss not divided by the accumulation steps
      file: FlagEmbedding/finetune/trainer.py
      old: "loss / self.args.gradient_accumulation_steps"   # must occur exactly once
      new: "loss"
      tests: [tests/finetune/test_accumulation.py]
      equivalent: why no test can notice                    # optional: listed, not run

Why not an automatic mutator: mutmut and cosmic-ray change every operator and run the whole suite for each, which takes
days where a test loads torch, and they never drop an option on its way, which is what went unnoticed here. For pure
functions (``FlagEmbedding/losses``, ``evaluation/metrics.py``) they serve well as a source of further entries.

The working tree is never touched: each worker has a copy of the files git knows, plus compiled kernels. Where the
system can fork, a worker loads torch and transformers once and forks for every fault, which takes a fifth of the time
that a new Python takes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from compileall import compile_dir
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import yaml

NEEDED = 0.95
# What is slow to import and no part of the repository.
PRELOADED = (
    "pytest", "torch", "torch.distributed", "numpy", "scipy.stats", "yaml", "jinja2", "tabulate", "faiss",
    "safetensors.torch", "tokenizers", "datasets", "accelerate", "simple_parsing", "transformers.trainer",
    "transformers.models.bert.modeling_bert", "transformers.models.roberta.modeling_roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "sentence_transformers", "matplotlib.pyplot", "ir_measures",
)  # fmt: skip
# No bytecode but what knows its source by checksum: a restored file of the same size and second would be taken for the
# one before. Libraries read their setting when they are loaded, for which tests/conftest.py comes too late; of pytest's
# plugins the tests use one.
SETTINGS = {
    "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One entry of a room's file."""

    room: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What the tests said: killed, survived, equivalent, skipped (no test runs on this machine) or broken (misfit)."""

    fault: Fault
    status: str
    detail: str = ""


class Runner:
    """Copies of the repository that ``jobs`` workers take in turn, and one pytest command in each."""

    def __init__(self, root: Path, scratch: Path, jobs: int, python: str, timeout: float, fork: bool) -> None:
        self.python, self.timeout = python, timeout
        self.free: queue.Queue[Path] = queue.Queue()
        self.servers: dict[Path, subprocess.Popen[str]] = {}
        for number in range(jobs):
            folder = copy_tree(root, scratch / f"copy{number}")
            if fork:
                command, pipe = [python, str(Path(__file__).resolve()), "--serve"], subprocess.PIPE
                self.servers[folder] = subprocess.Popen(
                    command, cwd=folder, env=settings(folder), stdin=pipe, stdout=pipe, text=True
                )
            self.free.put(folder)

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A copy nobody else uses meanwhile."""
        folder = self.free.get()
        yield folder
        self.free.put(folder)

    def pytest(self, folder: Path, tests: tuple[str, ...]) -> tuple[int, list[str]]:
        """Exit code and what pytest printed; a test that hangs fails (pytest-timeout)."""
        plugins = ["-p", "no:cacheprovider", "-p", "pytest_timeout"]
        options = ["-x", "--no-header", *plugins, "--timeout", f"{self.timeout:g}", *tests]
        if folder in self.servers:
            code, printed = ask(self.servers[folder], folder.with_suffix(".log"), options)
        else:
            done = execute([self.python, "-m", "pytest", *options], folder, env=settings(folder))
            code, printed = done.returncode, done.stdout.splitlines() or done.stderr.splitlines()
        return code, printed

    def all_pass(self, lists: list[tuple[str, ...]]) -> bool:
        """Whether tests of every list run and all pass before any fault: one pytest instead of one for each list."""
        with self.copy() as folder:
            code, printed = self.pytest(folder, ("-rp", *dict.fromkeys(test for each in lists for test in each)))
        passed = [line.removeprefix("PASSED ") for line in printed if line.startswith("PASSED ")]
        return code == 0 and all(any(each.startswith(tests) for each in passed) for tests in lists)

    def unmodified(self, tests: tuple[str, ...]) -> tuple[str, str]:
        """What is wrong with ``tests`` before any fault: a status and a detail, both empty when they pass."""
        with self.copy() as folder:
            code, printed = self.pytest(folder, tests)
        last = last_line(printed)
        if code:
            return "broken", f"fails without the fault: {last}"
        return ("", "") if re.search(r"\d+ passed", last) else ("skipped", last)

    def plant(self, fault: Fault) -> Outcome:
        """Put the fault into a copy, run its tests, take it out again."""
        with self.copy() as folder:
            path = folder / fault.file
            original = path.read_text(encoding="utf-8")
            path.write_text(original.replace(fault.old, fault.new), encoding="utf-8")
            code, printed = self.pytest(folder, fault.tests)
            path.write_text(original, encoding="utf-8")
        return Outcome(fault, "killed" if code else "survived", last_line(printed))


def last_line(printed: list[str]) -> str:
    """What pytest said of a failure, else its summary."""
    lines = [line for line in printed if line.startswith(("FAILED", "ERROR"))]
    return (lines or printed or [""])[-1][:200]


def execute(command: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder``; its output is text."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)


def settings(folder: Path) -> dict[str, str]:
    """The environment in which the tests of a copy run."""
    return {**os.environ, **SETTINGS, "PYTHONPATH": str(folder)}


def ask(server: subprocess.Popen[str], log: Path, arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and printed lines of one pytest that ``server`` (see ``serve``) forks."""
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([str(log), arguments]), file=server.stdin, flush=True)
    return int(server.stdout.readline()), log.read_text(encoding="utf-8", errors="replace").splitlines()


def serve() -> None:
    """For every line of stdin run pytest in a fork of this process, which has the slow libraries loaded."""
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    import pytest

    for line in sys.stdin:
        log, arguments = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for stream, target in ((0, nothing), (1, out), (2, out)):
                    os.dup2(target, stream)
                sys.argv, sys.path[0] = ["pytest", *arguments], os.getcwd()
                code = int(pytest.main(arguments))
                sys.stdout.flush()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy the files git knows or would add, and the compiled kernels, which it ignores."""
    listed = execute(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], root)
    names = [name for name in listed.stdout.split("\0") if name]
    for name in {*names, *(str(path.relative_to(root)) for path in (root / "FlagEmbedding").rglob("*.so"))}:
        if (root / name).is_file():  # not one that was deleted and is still in git's index
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    compile_dir(folder, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


def read_faults(root: Path, room: str) -> list[Fault]:
    """The entries of one room, or of all."""
    paths = sorted((root / "tests" / "mutants").glob("*.yaml" if room == "all" else f"{room}.yaml"))
    if not paths:
        raise SystemExit(f"no tests/mutants/{room}.yaml in {root}")
    entries = [(p.stem, entry) for p in paths for entry in yaml.safe_load(p.read_text(encoding="utf-8"))]
    return [Fault(room=stem, **{**entry, "tests": tuple(entry["tests"])}) for stem, entry in entries]


def cannot_plant(root: Path, fault: Fault) -> str:
    """Why this entry fits the code no longer; empty when it fits."""
    path = root / fault.file
    if not path.is_file():
        return f"no file {fault.file}"
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        return f"the old text occurs {text.count(fault.old)} times in {fault.file}"
    try:
        if path.suffix == ".py":
            compile(text.replace(fault.old, fault.new), fault.file, "exec")
    except SyntaxError as error:
        return f"with the fault {fault.file} is no Python: {error}"
    return ""


def run(root: Path, faults: list[Fault], runner: Runner, jobs: int, green: bool) -> Iterator[Outcome]:
    """First the tests as they are, all together, or each list by itself if not all pass; then one fault at a time."""
    to_plant = []
    for fault in faults:
        problem = cannot_plant(root, fault)
        if fault.equivalent or problem:
            yield Outcome(fault, "broken" if problem else "equivalent", problem or str(fault.equivalent))
        else:
            to_plant.append(fault)
    with ThreadPoolExecutor(jobs) as pool:
        lists = list(dict.fromkeys(fault.tests for fault in to_plant))
        before = dict.fromkeys(lists, ("", ""))
        if lists and not green and not runner.all_pass(lists):
            before = dict(zip(lists, pool.map(runner.unmodified, lists), strict=True))
        yield from (Outcome(fault, *before[fault.tests]) for fault in to_plant if before[fault.tests][0])
        yield from pool.map(runner.plant, (fault for fault in to_plant if not before[fault.tests][0]))


def write_results(path: Path, outcomes: list[Outcome], summary: str) -> None:
    """Write a .json with everything, or a Markdown table."""
    if path.suffix == ".json":
        path.write_text(json.dumps([asdict(o) for o in outcomes], indent=1, ensure_ascii=False), encoding="utf-8")
        return
    rows = [f"| {o.fault.room} | {o.fault.name} | {o.status} | {o.detail} |".replace("\n", " ") for o in outcomes]
    table = "\n".join(["| room | fault | status | detail |", "|---|---|---|---|", *rows])
    path.write_text(f"{table}\n\n{summary}\n", encoding="utf-8")


def main() -> int:
    """Parse the command line, run, print; 0 where at least 95 % are killed and nothing is broken."""
    parser = argparse.ArgumentParser(prog="make mutants", description="plant faults; see whether the tests notice")
    parser.add_argument("room", help="a file of tests/mutants without .yaml, or all")
    parser.add_argument("--only", default="", help="run the faults with this in their name or file")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    parser.add_argument("--jobs", type=int, default=1, help="copies worked on at the same time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per test; one that takes longer has failed")
    parser.add_argument("--green", action="store_true", help="the tests are known to pass: go on to the faults at once")
    parser.add_argument("--no-fork", action="store_true", help="a new Python for every fault")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the tests")
    parser.add_argument("--output", type=Path, help="write the results to this .json or .md")
    options = parser.parse_args()
    root = Path(execute(["git", "rev-parse", "--show-toplevel"], Path.cwd()).stdout.strip())
    faults = [f for f in read_faults(root, options.room) if options.only in f.name or options.only in f.file]
    if options.list:
        print(*(f"{fault.room}: {fault.name} ({fault.file})" for fault in faults), sep="\n")
        return 0
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        fork = hasattr(os, "fork") and not options.no_fork
        runner = Runner(root, Path(scratch), options.jobs, options.python, options.timeout, fork)
        for outcome in run(root, faults, runner, options.jobs, options.green):
            print(f"{outcome.status:10} {outcome.fault.room}: {outcome.fault.name}  [{outcome.detail}]", flush=True)
            outcomes.append(outcome)
    counts = Counter(outcome.status for outcome in outcomes)
    share = counts["killed"] / max(1, counts["killed"] + counts["survived"] + counts["broken"])
    summary = f"{share:.1%} killed: " + ", ".join(f"{number} {status}" for status, number in counts.most_common())
    print(summary)
    if options.output:
        write_results(options.output, outcomes, summary)
    return 0 if share >= NEEDED and not counts["broken"] else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
