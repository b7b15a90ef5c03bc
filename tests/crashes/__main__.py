"""End commands at random moments, start them again, and compare what they leave: ``make crashes``.

Every job is a public command on data made here. It runs once undisturbed, and then, ``--times`` times for each way of
ending it, with the same words until it ends by itself:

- ``kill``: SIGKILL at a random moment, up to three times in a row;
- ``stop``: SIGTERM or SIGINT, whatever the command does then;
- ``full``: no file may grow beyond a random size (RLIMIT_FSIZE), as on a full disk, then without that limit.

Nothing may be lost: the results have the bytes of the undisturbed run, at no moment is a result there that is not
whole, no ending prints a traceback, and nothing else is left in the folder. The table goes to standard output, and the
exit code is 1 if anything was lost. (Linux.)

Commands start in processes that a server forks with everything imported, so that the random moments fall into the work
and not into imports; ``--fresh`` starts an interpreter for each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from conftest import write_tiny  # noqa: E402
from crashes import child  # noqa: E402
from mining.chat_server import ChatServer  # noqa: E402

WAYS = ("kill", "stop", "full")
# What the four commands import once they work.
LOADED = [
    "faiss", "transformers.trainer", "FlagEmbedding.finetune.__main__", "FlagEmbedding.finetune.runner",
    "FlagEmbedding.evaluation.step0", "FlagEmbedding.mining.hard_negatives.pipeline",
    "FlagEmbedding.mining.query_generation.pipeline",
]  # fmt: skip
LANG = "ko"
NOUNS = ["river", "mountain", "temple", "bridge", "forest", "harbor", "desert", "castle", "island", "valley"]


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        words: what runs after ``python``, for an output folder.
        results: files of the output folder that must be whole whenever they are there, and the same at the end.
        logs: files that grow, and what of them must be the same at the end.
        again: what to add when it is started again.
    """

    words: Callable[[Path], list[str]]
    results: tuple[str, ...]
    logs: tuple[tuple[str, Callable[[bytes], object]], ...] = ()
    again: tuple[str, ...] = ()


@dataclass
class Trial:
    """What was seen in one trial: how often the command was ended, and everything that should not be."""

    endings: int
    faults: list[str]


def text(number: int) -> str:
    noun = NOUNS[number % len(NOUNS)]
    return f"The {noun} number {number} was built {number % 97} years ago beside the {NOUNS[number // 10 % 10]}."


def write_data(folder: Path, passages: int) -> None:
    """A corpus and topics in MIRACL's layout, training rows, and a tiny random model with dropout."""
    corpus = folder / f"miracl/miracl-corpus-v1.0-{LANG}/docs-0.jsonl.gz"
    corpus.parent.mkdir(parents=True)
    with gzip.open(corpus, "wt", encoding="utf-8") as stream:
        for number in range(passages):
            stream.write(json.dumps({"docid": f"d{number}#0", "title": "t", "text": text(number)}) + "\n")
    rows = [
        {"query": f"Which {NOUNS[i % 10]} is number {i}?", "pos": [text(i)], "neg": [text(i + 7), text(i + 1_003)]}
        for i in range(600)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_tiny(folder / "model", "xlmr", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def losses(state: bytes) -> list[object]:
    """What a run logged, but for its speed."""
    history = json.loads(state)["log_history"]
    return [{key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
            for entry in history if "loss" in entry]  # fmt: skip


def jobs(data: Path, base_url: str) -> dict[str, Job]:
    """The commands by name."""
    model = str(data / "model")

    def train(out: Path) -> list[str]:
        words = f"run.py --model_name_or_path {model} --train_data {data}/rows.jsonl --output_dir {out}/run"
        words += " --max_steps 120 --save_steps 10 --logging_steps 5 --per_device_train_batch_size 4"
        words += " --train_group_size 3 --learning_rate 1e-4 --save_total_limit 3 --moe intermediate --num_experts 2"
        return words.split()

    def step0(out: Path) -> list[str]:
        words = f"evaluation/step0-generate_embedding.py --encoder {model} --languages {LANG} --data_dir {data}/miracl"
        return f"{words} --index_save_dir {out} --max_passage_length 64 --shard_size 512".split()

    def hard_negatives(out: Path) -> list[str]:
        words = f"-m FlagEmbedding.mining hard_negatives --input_file {data}/rows.jsonl --encoder {model}"
        words += f" --corpus {data}/miracl/miracl-corpus-v1.0-{LANG} --index_dir {out}/index --search_batch_size 50"
        return f"{words} --range_for_sampling 2-30 --negative_number 5 --output_file {out}/mined.jsonl".split()

    def query_generation(out: Path) -> list[str]:
        words = f"-m FlagEmbedding.mining query_generation --input_file {data}/rows.jsonl --model m"
        words += f" --base_url {base_url} --output_file {out}/rows_q.jsonl --concurrency 4 --prompt"
        return [*words.split(), "Ask about: <p>{passage}</p>"]

    logs, again = (("run/trainer_state.json", losses),), ("--resume_from_checkpoint", "True")
    return {
        "train": Job(train, ("run/model.safetensors",), logs, again),
        "step0": Job(step0, (f"model/{LANG}/index", f"model/{LANG}/docid")),
        "hard_negatives": Job(hard_negatives, ("mined.jsonl", "index/index", "index/docid")),
        "query_generation": Job(query_generation, ("rows_q.jsonl",)),
    }


class Process:
    """The command in a process of a group of its own, both outputs to ``log``.

    Attributes:
        fresh: every one is a new interpreter.
    """

    fresh = False

    def __init__(self, words: list[str], log: Path, most_bytes: int | None = None) -> None:
        if self.fresh:
            self._popen = subprocess.Popen([sys.executable, child.__file__, str(log), str(most_bytes or 0), *words])
            self.pid, self._process = self._popen.pid, None
        else:
            self._process = multiprocessing.get_context("forkserver").Process(
                target=child.run, args=(words, str(log), most_bytes or 0)
            )
            self._process.start()
            assert self._process.pid is not None
            self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises ``TimeoutExpired``."""
        if self._process is None:
            return self._popen.wait(timeout)
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("command", timeout or 0.0)
        return self._process.exitcode


def read(job: Job, out: Path) -> dict[str, object]:
    """What must be the same in the end of each file that is there."""
    files = {**dict.fromkeys(job.results, bytes), **dict(job.logs)}
    return {name: same((out / name).read_bytes()) for name, same in files.items() if (out / name).exists()}


def entries(out: Path) -> set[str]:
    """Everything in the folder but reports, which say when and how long.

    A signal leaves a checkpoint of the step it came in, so checkpoints count by what is in them.
    """
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return {re.sub(r"checkpoint-\d+/", "checkpoint-N/", name) for name in found if not name.startswith("reports/")}


def try_once(job: Job, way: str, out: Path, expected: dict[str, object], seconds: float, biggest: int) -> Trial:
    """One trial: end the command as ``way`` says until it ends by itself, and look at what it leaves."""
    out.mkdir()
    log, trial = out.with_suffix(".log"), Trial(0, [])
    for attempt in range(10):
        words = job.words(out) + (list(job.again) if attempt else [])
        disturbed = attempt < (3 if way == "kill" else 1)
        limit = random.randint(1, biggest) if way == "full" and disturbed else None
        process = Process(words, log, limit)
        try:
            code = process.wait(random.uniform(0.05, 0.95) * seconds if disturbed and way != "full" else 600)
        except subprocess.TimeoutExpired:
            trial.endings += 1
            sign = signal.SIGKILL if way == "kill" else random.choice([signal.SIGTERM, signal.SIGINT])
            os.killpg(process.pid, sign)
            code = process.wait(120)
            if code == 0 and read(job, out) != expected:
                trial.faults.append(f"exit 0 after {sign.name}, and no result")
        else:
            trial.endings += code != 0
            if code and limit is None:
                trial.faults.append(f"exit {code}, undisturbed")
                break
        for name, value in read(job, out).items():
            if name in job.results and value != expected[name]:
                trial.faults.append(f"{name} is there and not whole")
        if code == 0:
            break
    time.sleep(0.1)  # for tee
    if read(job, out) != expected:
        trial.faults.append("another result")
    if "Traceback" in log.read_text(encoding="utf-8", errors="replace"):
        trial.faults.append("a traceback")
    return trial


@contextmanager
def _server() -> Iterator[str]:
    with ChatServer(delay=0.01) as server:
        yield server.base_url


def main() -> int:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="trials for each job and way")
    parser.add_argument("--only", nargs="+", help="names of jobs")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--passages", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="folder for everything that the trials write; default: a temporary one"
    )
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each start")
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "evaluation")])
    Process.fresh = options.fresh
    if not Process.fresh:
        multiprocessing.set_forkserver_preload(LOADED)
        first = multiprocessing.get_context("forkserver").Process(target=int)  # the server's imports are no job's time
        first.start()
        first.join()
    lines, lost = [], 0
    with tempfile.TemporaryDirectory() as temporary, _server() as base_url:
        folder = options.keep or Path(temporary)
        (data := folder / "data").mkdir(parents=True)
        write_data(data, options.passages)
        for name, job in jobs(data, base_url).items():
            if options.only and name not in options.only:
                continue
            whole, began = folder / f"{name}-whole", time.monotonic()
            whole.mkdir()
            if Process(job.words(whole), whole.with_suffix(".log")).wait() != 0:
                raise SystemExit(f"{name}: {whole.with_suffix('.log').read_text(encoding='utf-8')}")
            seconds = time.monotonic() - began
            expected, there = read(job, whole), entries(whole)
            assert len(expected) == len(job.results) + len(job.logs), name
            biggest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
            for way in options.ways:
                faults: Counter[str] = Counter()
                endings = wrong = 0
                for number in range(options.times):
                    out = folder / f"{name}-{way}-{number}"
                    trial = try_once(job, way, out, expected, seconds, biggest)
                    if left := entries(out) - there:
                        trial.faults.append(f"left: {', '.join(sorted(left)[:3])}")
                    endings, wrong = endings + trial.endings, wrong + bool(trial.faults)
                    faults.update(trial.faults)
                said = "; ".join(f"{fault} ({count})" for fault, count in faults.items())
                lines.append([name, way, options.times, endings, options.times - wrong, said])
                lost += wrong
                print(*map(str, lines[-1]), sep=" | ", flush=True)
    headers = ["command", "ended by", "trials", "times ended", "same result", "what was wrong"]
    print(tabulate(lines, headers, tablefmt="pipe", disable_numparse=True))
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
