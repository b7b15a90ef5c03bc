"""Run the numeric tests under each instruction set that this machine can stand in for: ``make test-isa``.

A processor with more can compute as one with less: torch (``ATEN_CPU_CAPABILITY``), oneDNN (``ONEDNN_MAX_CPU_ISA``) and
this project's kernels (``FLAGEMBEDDING_KERNELS``) are told so by the environment. Each environment is a pytest of its
own over the tests marked ``numeric``; what passed, failed and was skipped is printed as a table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from FlagEmbedding.modeling import kernels
from FlagEmbedding.utils.hardware import cpu_instruction_sets

REPOSITORY = Path(__file__).resolve().parents[2]
SWITCHES = ("FLAGEMBEDDING_KERNELS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# What oneDNN and torch are told so that they use no more than this project's set of the same name.
LEVELS = {"avx512": ("AVX512_CORE", "avx512"), "avx2": ("AVX2", "avx2"), "none": ("SSE41", "default")}


@dataclass(frozen=True)
class Result:
    """Counts of one environment, and the tests that failed there."""

    name: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float


def environments() -> dict[str, dict[str, str]]:
    """The switches to set under each name; which there are depends on the processor."""
    sets = [name for name in cpu_instruction_sets() if kernels.load(name) is not None]
    found: dict[str, dict[str, str]] = {"native": {}, "no kernels": {"FLAGEMBEDDING_KERNELS": "0"}}
    for name in sets:
        if name in LEVELS:  # neon is all that an Arm processor has
            onednn, torch_level = LEVELS[name]
            switches = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": torch_level}
            found[name] = {"FLAGEMBEDDING_KERNELS": name} | switches
    if "neon" not in sets:
        found["x86-64 alone"] = {"ONEDNN_MAX_CPU_ISA": LEVELS["none"][0], "ATEN_CPU_CAPABILITY": LEVELS["none"][1]}
    return found


def run(name: str, switches: dict[str, str], words: list[str]) -> Result:
    """Pytest in one environment."""
    environment = {key: value for key, value in os.environ.items() if key not in SWITCHES} | switches
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "numeric", "--junitxml", str(report), *words]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - begin
        if not report.is_file():
            raise SystemExit(f"{name}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = tuple(f"{case.get('classname')}::{case.get('name')}" for case in wrong)
    return Result(name, len(cases) - len(failed) - skipped, failed, skipped, seconds)


def main() -> int:
    """Run all environments, print the table; 1 where anything failed or nothing ran."""
    parser = argparse.ArgumentParser(prog="make test-isa", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="leave these environments out")
    options, words = parser.parse_known_args()
    results = []
    for name, switches in environments().items():
        if name in options.without:
            continue
        told = " ".join(f"{key}={value}" for key, value in switches.items()) or "no switch"
        print(f"{name}: {told}", flush=True)
        results.append(run(name, switches, words))
        print(*(f"  FAILED {test}" for test in results[-1].failed), sep="\n", end="\n" if results[-1].failed else "")
    rows = [(r.name, r.passed, len(r.failed), r.skipped, round(r.seconds)) for r in results]
    print(tabulate(rows, ["instructions", "passed", "failed", "skipped", "seconds"], tablefmt="github"))
    return int(any(r.failed or not r.passed for r in results))


if __name__ == "__main__":
    sys.exit(main())
