"""This project and its peers side by side: the same texts, model and objective, in one run on one machine.

    python benchmarks/fixture.py FIXTURE
    python benchmarks/compare.py --fixture FIXTURE --peer-python PEERS/bin/python [--cases encode_fp32_mixed …]

PEERS is a virtual environment of its own: pip install FlagEmbedding==1.4.2 sentence-transformers==6.2.0, and the same
torch. Every case runs its contestants in turn, ``--repeats`` times, each in a process of its own; what is reported
are medians, and medians of the ratios within a turn. Figures go to ``--output`` (JSON) turn by turn, so that a case may
be run again alone; ``--table`` prints them as Markdown. ``--short`` is for slow machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
OURS = "this"


@dataclass(frozen=True)
class Contestant:
    """One engine in one case: the script to run, its words, and whether the peers' Python runs it."""

    script: str
    words: tuple[str, ...]
    peer: bool = False


@dataclass(frozen=True)
class Case:
    """What is compared. The first contestant is the one the ratios are of; ``goal`` is what it should reach."""

    title: str
    contestants: dict[str, Contestant]
    goal: str = ""
    per_token: bool = field(default=True)  # ratios of time a token; False: of time a step


def encode(title: str, texts: str, count: int, dtype: str, goal: str, peers: tuple[str, ...]) -> Case:
    """The first ``count`` texts of a corpus through every engine's ``encode``, dense vectors."""
    words = ("--model", "@/dense", "--texts", f"@/texts_{texts}.jsonl", "--limit", str(count), "--dtype", dtype)
    contestants = {OURS: Contestant("time_encode.py", ("--engine", "flagembedding", *words))}
    for peer in peers:
        contestants[peer] = Contestant("time_encode.py", ("--engine", peer, *words), peer=True)
    return Case(title, contestants, goal)


def train(title: str, dtype: str, goal: str) -> Case:
    """The same rows and objective through every engine's trainer."""
    words = ("--model", "@/dense", "--data", "@/train", "--dtype", dtype)
    # Ours gets more steps than the slower peers: a longer span is a steadier figure.
    contestants = {OURS: Contestant("time_train.py", ("--engine", "this", "--steps", "10", *words))}
    for peer in ("flagembedding", "sentence-transformers"):
        contestants[peer] = Contestant("time_train.py", ("--engine", peer, "--steps", "3", *words), peer=True)
    return Case(title, contestants, goal)


def own(title: str, goal: str, script: str, pairs: dict[str, tuple[str, ...]], per_token: bool = False) -> Case:
    """This project against itself in another setting."""
    return Case(title, {name: Contestant(script, words) for name, words in pairs.items()}, goal, per_token)


def step(model: str, rows: str, *more: str, steps: int = 10) -> tuple[str, ...]:
    """Words of time_train.py for this project on one of the fixture's models and folders of rows."""
    return ("--engine", "this", "--steps", str(steps), "--model", f"@/{model}", "--data", f"@/{rows}", *more)


def corpus(model: str) -> tuple[str, ...]:
    """Words of time_encode.py for this project."""
    return ("--engine", "flagembedding", "--model", f"@/{model}", "--texts", "@/texts_mixed.jsonl")


PEERS = ("flagembedding", "sentence-transformers")
CLP = ("train_clp", "--clp")
CASES = {
    "encode_fp32_mixed": encode(
        "Encode 320 texts of four scripts, fp32",
        "mixed",
        320,
        "fp32",
        "≥ 0.90 of the floor, ≥ 2.2 × the better peer",
        PEERS,
    ),
    "encode_fp32_mixed_1000": encode("Encode 1,000 texts of four scripts, fp32", "mixed", 1000, "fp32", "", PEERS),
    "encode_fp32_one": encode(
        "Encode 1,000 texts of one script, fp32",
        "one",
        1000,
        "fp32",
        "≥ 0.90 of the floor, ≥ 1.45 × the better peer",
        PEERS,
    ),
    # Upstream computes in fp32 on a CPU, whatever it is asked for.
    "encode_bf16_mixed": encode(
        "Encode 320 texts of four scripts, bf16", "mixed", 320, "bf16", "≥ 0.80 of the floor", PEERS[1:]
    ),
    "encode_runtimes": encode(
        "Encode 320 texts of four scripts, fp32, against exported models",
        "mixed",
        320,
        "fp32",
        "",
        ("onnxruntime", "onnxruntime-int8", "openvino"),
    ),
    "train_fp32": train(
        "Train, fp32, dropout 0.1", "fp32", "≥ 0.70 of the floor, ≥ 3 × the better peer, ≤ 0.35 of its memory"
    ),
    "train_bf16": train(
        "Train, bf16, dropout 0.1", "bf16", "≥ 0.60 of the floor, ≥ 4 × the better peer, ≤ 0.35 of its memory"
    ),
    "moe_encode": own(
        "Encode with 2 experts, top 1, against dense",
        "≤ 1.03",
        "time_encode.py",
        {name: corpus(name) for name in ("dense", "moe")},
    ),
    "moe_train": own(
        "Train step with 2 experts, top 1, against dense",
        "≤ 1.03",
        "time_train.py",
        {name: step(name, "train") for name in ("dense", "moe")},
    ),
    "clp_share": own(
        "CLP: a step with the negatives' queries against one without",
        "≤ 1.12",
        "time_train.py",
        {"without": step("dense", "train"), "with": step("dense", *CLP)},
    ),
    "published_loop": own(
        "CLP + MoE step against the published loop (three padded forwards)",
        "≥ 4 ×",
        "time_train.py",
        {OURS: step("moe", *CLP), "published": step("moe", *CLP, "--extra", "--engine", "padded", steps=3)},
        per_token=True,
    ),
    "only_train": own(
        "CLP + MoE step: --only_train intermediate against training everything",
        "",
        "time_train.py",
        {"everything": step("moe", *CLP), "only": step("moe", *CLP, "--extra", "--only_train", "intermediate")},
    ),
    "grad_cache": own(
        "Gradient caching, batch 64 × group 5, against the plain batch",
        "≤ 1.35",
        "time_train.py",
        {
            "plain": step("dense", "train", "--batch-size", "64", steps=2),
            "cached": step("dense", "train", "--batch-size", "64", "--extra", "--grad_cache", "True", steps=2),
        },
    ),
}


def shortened(contestant: Contestant) -> list[str]:
    """Words that make a measurement short; the last of a repeated option counts."""
    if contestant.script == "time_encode.py":
        return ["--limit", "160"]
    slow = contestant.peer or "padded" in contestant.words
    return ["--batch-size", "2", "--rows", "2", "--steps", "1" if slow else "4"]


def run(contestant: Contestant, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    python = arguments.peer_python if contestant.peer else sys.executable
    words = [word.replace("@", str(arguments.fixture), 1) if word[0] == "@" else word for word in contestant.words]
    extra = words[words.index("--extra") :] if "--extra" in words else []
    words = words[: len(words) - len(extra)]
    if arguments.short:
        words += shortened(contestant)
    words += ["--threads", str(arguments.threads), "--device", arguments.device, *extra]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    if not contestant.peer:
        environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [*shlex.split(arguments.launcher), python, str(HERE / contestant.script), *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=arguments.fixture,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{contestant.script} {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cost(record: dict[str, Any], per_token: bool, by_processor: bool) -> float:
    """Seconds a token, or a step (or call)."""
    seconds = record["cpu_seconds"] if by_processor else record["wall_seconds"]
    return seconds / record["tokens"] if per_token else seconds / record.get("steps", 1)


def summarise(case: Case, turns: list[dict[str, dict[str, Any]]], by_processor: bool) -> dict[str, Any]:
    """Medians of each contestant, and of each one's cost over the first's within a turn."""
    first = next(iter(case.contestants))
    summary: dict[str, Any] = {}
    for name in case.contestants:
        costs = [cost(turn[name], case.per_token, by_processor) for turn in turns]
        ratios = [
            cost(turn[name], case.per_token, by_processor) / cost(turn[first], case.per_token, by_processor)
            for turn in turns
        ]
        summary[name] = {
            "cost_seconds": statistics.median(costs),
            "tokens_per_second": statistics.median(1 / cost(turn[name], True, by_processor) for turn in turns),
            "of_floor": statistics.median(turn[name]["of_floor"] for turn in turns),
            "peak_mb": statistics.median(turn[name].get("peak_gpu_mb", turn[name]["peak_rss_mb"]) for turn in turns),
            "times_first": round(statistics.median(ratios), 3),
            "times_first_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return summary


def table(results: dict[str, Any]) -> str:
    """All cases as Markdown."""
    lines = ["| | engine | time ÷ the first's | tokens/s | of the floor | peak MB |", "|---|---|---|---|---|---|"]
    for name, case in results["cases"].items():
        texts = next(iter(case["runs"][0].values())).get("texts")  # as many as there were
        title = f"{re.sub(r'[0-9,]+ texts', f'{texts:,} texts', case['title']) if texts else case['title']} (`{name}`)"
        for engine, row in case["summary"].items():
            low, high = row["times_first_range"]
            times = f"{row['times_first']:.2f}" + (f" ({low:.2f}–{high:.2f})" if low != high else "")
            lines.append(
                f"| {title} | {engine} | {times} | {row['tokens_per_second']:,.0f} | {row['of_floor']:.2f} | "
                f"{row['peak_mb']:,.0f} |"
            )
            title = ""
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    name = platform.processor()
    flags: list[str] = []
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name"))
        known = next(line for line in info.splitlines() if line.startswith("flags")).split()
        flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known]
    except (OSError, StopIteration):
        pass
    found: dict[str, Any] = {"processor": name, "cores": os.cpu_count(), "flags": flags}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def peer_versions(python: str) -> dict[str, str]:
    """Versions in the peers' Python."""
    names = ("torch", "transformers", "FlagEmbedding", "sentence-transformers")
    code = f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixture", type=Path, help="folder made by fixture.py")
    parser.add_argument("--peer-python", help="a Python that holds the peers")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of every engine; 0: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--short", action="store_true", help="160 texts; 4 steps of ours and 1 of a peer, over 2 rows")
    parser.add_argument("--launcher", default="", help="words before each measurement's command: 'taskset -c 1'")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--table", action="store_true", help="print what --output holds and stop")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"cases": {}}
    if arguments.table:
        print(table(results))
        return 0
    peers = any(c.peer for name in arguments.cases for c in CASES[name].contestants.values())
    if arguments.fixture is None or (peers and arguments.peer_python is None):
        parser.error("--fixture is needed, and --peer-python for the cases with peers")
    arguments.fixture = arguments.fixture.resolve()
    sys.path.insert(0, str(REPOSITORY))
    from FlagEmbedding.utils.io import write_json_atomic
    from FlagEmbedding.utils.provenance import provenance

    by_processor = arguments.device == "cpu" and arguments.threads == 1
    about = provenance()
    results["machine"] = machine(arguments.device)
    results["peers"] = peer_versions(arguments.peer_python) if peers else results.get("peers", {})
    for name in arguments.cases:
        case = CASES[name]
        turns: list[dict[str, Any]] = []
        record: dict[str, Any] = {"title": case.title, "goal": case.goal, "threads": arguments.threads}
        record |= {"per_token": case.per_token, "commit": about["commit"], "versions": about["versions"], "runs": turns}
        results["cases"][name] = record
        for _ in range(arguments.repeats):
            turns.append({engine: run(contestant, arguments) for engine, contestant in case.contestants.items()})
            record["summary"] = summarise(case, turns, by_processor)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(arguments.output, results)
        print(table({"cases": {name: record}}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
