r"""Kill training at random moments, go on, and see whether the end is that of the run that nobody disturbed.

    python benchmarks/kills.py --model FIXTURE/dense --train_data data/sample/train --output_dir WORK \
        -- --max_steps 200 --save_steps 5

Each kill comes a random time after training has begun, in a step or in saving as it falls (SIGKILL; ``--gentle``: every
second time SIGTERM); the next start goes on with --resume_from_checkpoint True. At the end every logged number and
weight must equal, bit for bit, those of one run of the same command. Words after ``--`` go to run.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
# The duration and what follows from it.
VOLATILE = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """run.py, its output at the end of ``log``."""
    with open(log, "ab") as stream:
        return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *words], stdout=stream, stderr=stream)


def begun(process: subprocess.Popen[bytes], log: Path, already: int) -> bool:
    """Wait until the log tells of one more run that starts or goes on; False where the process ends before that."""
    while process.poll() is None:
        if len(re.findall(r"run \S+: (?:starts|goes on)", log.read_text(errors="replace"))) > already:
            return True
        time.sleep(0.05)
    return False


def history(folder: Path) -> list[dict[str, object]]:
    """The logged lines of a run that has ended."""
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines if "loss" in line]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def main() -> int:
    """Run, kill, compare, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_data", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--after", type=float, nargs=2, default=(0, 10), metavar="S", help="seconds before a kill: from, to"
    )
    parser.add_argument("--gentle", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="more words for run.py, after --")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    whole, broken = options.output_dir / "whole", options.output_dir / "broken"
    options.output_dir.mkdir(parents=True)
    base = ["--model_name_or_path", options.model, "--train_data", options.train_data, *options.words]
    base += ["--save_strategy", "steps", "--disable_tqdm", "True"]

    if start([*base, "--output_dir", str(whole)], options.output_dir / "whole.log").wait():
        print(f"the undisturbed run failed: see {options.output_dir}/whole.log")
        return 1
    words = [*base, "--output_dir", str(broken), "--resume_from_checkpoint", "True"]
    log, starts = options.output_dir / "broken.log", 0
    killed, drafts, torn, gained = Counter[str](), 0, 0, list[int]()
    while sum(killed.values()) < options.kills:
        before = newest(broken)
        process = start(words, log)
        begun(process, log, starts)
        starts += 1
        number = signal.SIGTERM if options.gentle and sum(killed.values()) % 2 else signal.SIGKILL
        try:
            process.wait(generator.uniform(*options.after))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.wait()
            killed[signal.Signals(number).name] += 1
            drafts += any(broken.glob(".saving-*/*"))
            torn += sum(not (path / "run.json").exists() for path in broken.glob("checkpoint-*"))
            gained.append(newest(broken) - before)
            continue
        if process.returncode:
            print(f"a start failed with {process.returncode}: see {options.output_dir}/broken.log")
            return 1
        break
    last = start(words, log).wait()
    ours, theirs = load_file(broken / "model.safetensors"), load_file(whole / "model.safetensors")
    weights = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = history(broken) == history(whole)
    print(f"{dict(killed)} kills of {history(whole)[-1]['step']} steps; last start: exit {last}")
    print(f"steps gained by each start: {gained}")
    print(f"killed while a checkpoint was being written: {drafts}; half checkpoints under a checkpoint's name: {torn}")
    print(f"logged lines equal bit for bit: {lines} ({len(history(whole))}); weights: {weights} ({len(ours)} tensors)")
    return 0 if weights and lines and not last and not torn else 1


if __name__ == "__main__":
    sys.exit(main())
