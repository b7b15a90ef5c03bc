"""A place with a tiny model and small data, in which a situation is made and a published command is run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import STEPS, run_script
from conftest import write_tiny
from finetune.helpers import rows, train_words, write_rows

LANG = "ko"
_MODULES = ("merge", "export", "mining", "evaluation", "demo")
_NOISE = re.compile(r"RuntimeWarning|warn\(|^\s*$|Loading weights|it/s\]|\d+%\|")
_LONGEST = 330
# What differs from run to run.
_VARYING = (
    (r"^\d\d:\d\d:\d\d ", ""), (r"\d{8}-\d{6}-[0-9a-f]{6}", "RUN"), (r"\(\d+ on \S+\)", "(PID on HOST)"),
    (r"process \d+ on [^)]+", "process PID on HOST"), (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
)  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """Something that goes wrong, and what came of it in earlier versions.

    Attributes:
        what: the situation, in a few words.
        before: what came of it in earlier versions; "" where it is another case of the same kind.
        act: makes it in a place; what the place runs last is what is shown.
        shows: a pattern of the line to show where no error is printed.
    """

    what: str
    before: str
    act: Callable[[Place], object]
    shows: str = ""


@dataclass
class Outcome:
    """Exit code, everything printed, and how the folder changed."""

    code: int
    printed: str
    left: str


@dataclass
class Place:
    """A folder of its own for one situation, with what all of them share."""

    folder: Path
    model: Path
    outcomes: list[Outcome] = field(default_factory=list)

    def write(self, name: str, content: str | bytes | list[dict[str, Any]]) -> Path:
        """A file in the place: text, bytes, or rows as JSON lines."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, command: str, *words: object) -> Outcome:
        """``run.py``, ``step0`` to ``step2``, or ``mining convert`` and the like, in this process."""
        before = seen(self.folder)
        name, *more = command.split()
        try:
            if name.startswith("step"):
                answer = run_script(STEPS[int(name[-1])], words)
            elif name in _MODULES:
                module = f"FlagEmbedding/{name}/__main__.py"
                answer = run_script(module, [*more, *words])
            else:
                answer = run_script(name, [*more, *words])
            code, printed = answer.returncode, answer.stderr + answer.stdout
        except BaseException:  # noqa: BLE001 — a traceback is what is looked for
            code, printed = 1, traceback.format_exc()
        self.outcomes.append(Outcome(code, printed, difference(before, seen(self.folder))))
        return self.outcomes[-1]

    def call(self, act: Callable[[], object]) -> Outcome:
        """A call of the Python classes: what it returns or raises."""
        from FlagEmbedding.utils.errors import UserError

        try:
            code, printed = 0, str(act())
        except (UserError, ImportError) as error:
            code, printed = 2, f"{type(error).__name__}: {error}"
        except Exception:  # noqa: BLE001 — as above
            code, printed = 1, traceback.format_exc()
        self.outcomes.append(Outcome(code, printed, ""))
        return self.outcomes[-1]

    def rows(self, name: str = "rows.jsonl", count: int = 24) -> Path:
        """Training rows."""
        return write_rows(self.folder / name, rows(count))

    def train(self, output: str = "out", data: Path | None = None, **options: Any) -> Outcome:
        """``run.py`` on the place's rows, two steps with a checkpoint after each."""
        data = data or self.folder / "rows.jsonl"
        if not data.exists():
            self.rows(data.name)
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "cache_path": self.folder.parent / "kept",
                   **options}  # fmt: skip
        model = options.pop("model", self.model)
        return self.run("run.py", *train_words(model, data, self.folder / output, **options))

    def collection(self, count: int = 20, lang: str = LANG) -> Path:
        """A corpus with topics and qrels in MIRACL's layout."""
        passages = [
            {"docid": f"d{i}#0", "title": "t", "text": f"Passage {i} tells of river {i}."} for i in range(count)
        ]
        self.write(f"data/miracl-corpus-v1.0-{lang}/docs-0.jsonl", passages)
        kinds = {"topics": "{0}\tWhat does passage {0} tell of?\n", "qrels": "{0} Q0 d{0}#0 1\n"}
        for kind, line in kinds.items():
            content = "".join(line.format(i) for i in range(5))
            self.write(f"data/miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-dev.tsv", content)
        return self.folder / "data"

    def step0(self, *words: object) -> Outcome:
        """Step 0 on the place's collection."""
        if not (self.folder / "data").exists():
            self.collection()
        place = ("--data_dir", self.folder / "data", "--index_save_dir", self.folder / "index")
        return self.run("step0", "--encoder", self.model, "--languages", LANG, *place, *words)

    def step1(self, *words: object) -> Outcome:
        """Step 1 after it."""
        place = ("--data_dir", self.folder / "data", "--index_save_dir", self.folder / "index")
        more = ("--result_save_dir", self.folder / "runs", "--hits", 10)
        return self.run("step1", "--encoder", self.model, "--languages", LANG, *place, *more, *words)

    def step2(self, *words: object) -> Outcome:
        """Step 2 after that."""
        place = ("--search_result_save_dir", self.folder / "runs", "--qrels_dir", self.folder / "data")
        more = ("--eval_result_save_dir", self.folder / "eval", "--metrics", "ndcg@10")
        return self.run("step2", "--encoder", self.model, "--languages", LANG, *place, *more, *words)

    @property
    def index(self) -> Path:
        """Where step 0 puts the index."""
        return self.folder / "index" / self.model.name / LANG


def seen(folder: Path) -> dict[str, str]:
    """Digest of each file below ``folder`` by its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """What is new, changed or gone, by the names of files and top folders."""
    parts = [
        ("new", [name for name in after if name not in before]),
        ("changed", [name for name in after if name in before and after[name] != before[name]]),
        ("gone", [name for name in before if name not in after]),
    ]
    told = [f"{what}: {_names(names)}" for what, names in parts if names]
    return "; ".join(told) or "as before"


def _names(names: Sequence[str]) -> str:
    tops = list(dict.fromkeys("/".join(name.split("/")[:2]) for name in names))
    return ", ".join(tops[:3]) + (f" and {len(tops) - 3} more" if len(tops) > 3 else "")


def tidy(text: str) -> str:
    """``text`` without what differs from run to run."""
    for pattern, word in _VARYING:
        text = re.sub(pattern, word, text)
    return text


def shown(outcome: Outcome, shows: str, *folders: Path) -> str:
    """The line of an outcome that tells a user what happened, without the folders' own names."""
    text = outcome.printed
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    lines = [line for line in text.splitlines() if not _NOISE.search(line)]
    if "Traceback" in text:
        return f"TRACEBACK {lines[-1][:_LONGEST]}"
    found = [line for line in lines if line.startswith("error:") or "Error: " in line]
    if shows and not found:
        found = [line for line in lines if re.search(shows, line)]
    found = found or [line for line in lines if "WARNING" in line or "warning" in line] or lines[-1:]
    line = "".join(found[-1:]).strip()
    if line.endswith(":"):  # several problems: the first
        line += f" {lines[lines.index(found[-1]) + 1].strip()}"
    line = tidy(line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def place_for(folder: Path, number: int) -> Place:
    """A fresh place below ``folder``, which holds the shared model."""
    model = folder / "tiny"
    if not model.exists():
        write_tiny(model, "xlmr")
    own = folder / f"s{number}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    return Place(own, model)
