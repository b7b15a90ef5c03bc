"""What the table consists of: rows from table.yaml, cells (row, language, seed), and each cell's chain of commands.

A cell is four public commands: run.py, step 0, step 1, step 2. Every stage has a key: a hash over everything that
decides its product (recipe, options, seed, base model, training file, corpus, topics, judgments, and the key of the
stage before). A stage whose recorded key is the present one and whose product is there is not run again.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from FlagEmbedding.retrieval.index import index_name
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import digest

STAGES = ("train", "index", "search", "score")


@dataclass(frozen=True)
class Row:
    """One row: the base model as it is (no recipe), or trained after a recipe on a file per language."""

    name: str
    recipe: Path | None
    train_file: str | None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Table:
    """table.yaml: rows in order, and the published scores (× 100) by row name, language and measure."""

    rows: list[Row]
    published: dict[str, dict[str, dict[str, float]]]
    source: str
    published_model: str  # folder or repository name of the base model that the published scores are of

    def score(self, row: str, lang: str, key: str) -> float | None:
        """The published score × 100 of a measure, None where there is none."""
        return self.published.get(row, {}).get(lang, {}).get(key)

    def has(self, lang: str, key: str) -> bool:
        """Whether any row has one."""
        return any(self.score(row, lang, key) is not None for row in self.published)


@dataclass(frozen=True)
class Cell:
    """A row's model for one language and seed (None: the base model needs none)."""

    row: Row
    lang: str
    seed: int | None

    @property
    def id(self) -> str:
        return f"{self.row.slug}-{self.lang}" + ("" if self.seed is None else f"-seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.row.name}, {self.lang}" + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True)
class Options:
    """What every cell shares.

    Attributes:
        root: the checkout, where run.py and evaluation/ are.
        base_model: hub id or folder.
        train_options, index_options, search_options: further words of the commands.
        launcher: words before ``run.py`` (a Python, or torchrun with its options).
    """

    root: Path
    output_dir: Path
    base_model: str
    train_dirs: list[Path]
    data_dir: Path | None
    split: str
    metrics: list[str]
    train_options: list[str]
    index_options: list[str]
    search_options: list[str]
    launcher: list[str]

    def encoder(self, cell: Cell) -> str:
        """The model a cell evaluates."""
        return self.base_model if cell.row.recipe is None else str(self.output_dir / "models" / cell.id)

    def train_file(self, cell: Cell) -> Path:
        """The row's training file, from the first folder that has it. Raises ``DataError`` where none has."""
        assert cell.row.train_file is not None
        name = cell.row.train_file.format(lang=cell.lang)
        for folder in self.train_dirs:
            if (folder / name).is_file():
                return folder / name
        places = ", ".join(str(folder) for folder in self.train_dirs)
        raise DataError(f"--train_dir {places}: no {name} there, which row {cell.row.name!r} is trained on")

    def product(self, cell: Cell, stage: str) -> Path:
        """The file whose presence says that a stage was finished."""
        name, out = index_name(self.encoder(cell)), self.output_dir
        return {
            "train": Path(self.encoder(cell)) / "config.json",
            "index": out / "corpus-index" / name / cell.lang / "index",
            "search": out / "search_results" / name / f"{cell.lang}.txt",
            # One folder per language: step 2 names its file after the model alone, and the base model has several.
            "score": out / "eval_results" / cell.lang / f"{name}.json",
        }[stage]

    def command(self, cell: Cell, stage: str, qrels: Path | None = None) -> list[str]:
        """The public command of a stage."""
        encoder, out = self.encoder(cell), self.output_dir
        if stage == "train":
            words = ["--model_name_or_path", self.base_model, "--train_data", str(self.train_file(cell))]
            words += ["--output_dir", encoder, "--seed", str(cell.seed), *self.train_options]
            words += ["--resume_from_checkpoint", "True"]  # where a signal ended it (what other inputs left is gone)
            return [*self.launcher, str(self.root / "run.py"), str(cell.row.recipe), *words]
        where = ["--encoder", encoder, "--languages", cell.lang, "--split", self.split]
        data = [] if self.data_dir is None else ["--data_dir", str(self.data_dir)]
        index = ["--index_save_dir", str(out / "corpus-index")]
        runs = str(out / "search_results")
        if stage == "index":
            # --overwrite: what was left by other inputs goes, an unfinished index of the same inputs goes on.
            script, words = "step0-generate_embedding.py", [*data, *index, "--overwrite", "True", *self.index_options]
        elif stage == "search":
            script, words = "step1-search_results.py", [*data, *index, "--result_save_dir", runs, *self.search_options]
        else:
            folder = qrels or self.data_dir
            words = [] if folder is None else ["--qrels_dir", str(folder)]
            words += ["--search_result_save_dir", runs, "--eval_result_save_dir", str(self.product(cell, stage).parent)]
            script, words = "step2-eval_dense_mldr.py", [*words, "--metrics", *self.metrics]
        return [sys.executable, str(self.root / "evaluation" / script), *where, *words]

    def inputs(self, cell: Cell, stage: str) -> dict[str, Any]:
        """The options of a stage that decide its product, free of folders."""
        if stage == "train":
            assert cell.row.recipe is not None
            return {"recipe": _load(cell.row.recipe), "options": self.train_options, "seed": cell.seed}
        if stage == "index":
            return {"options": self.index_options, "lang": cell.lang}
        if stage == "search":
            return {"options": self.search_options, "split": self.split}
        return {"metrics": self.metrics}


def read_table(path: Path) -> Table:
    """Read table.yaml and check that its recipes are there. Raises ``DataError``."""
    value = _load(path)
    rows: list[Row] = []
    given, published = value.get("rows") or [], value.get("published") or {}
    if not isinstance(given, list) or not isinstance(published, dict):
        raise DataError(f"{path}: expected rows as a list and published as a mapping")
    for number, item in enumerate(given, 1):
        texts = isinstance(item, dict) and all(isinstance(text, str | None) for text in item.values())
        if not texts or not item.get("name") or set(item) - {"name", "recipe", "train_file"}:
            raise DataError(f"{path}: row {number}: expected name, recipe and train_file, found {str(item)[:80]!r}")
        if bool(item.get("recipe")) != bool(item.get("train_file")):
            raise DataError(f"{path}: row {item['name']!r}: recipe and train_file go together")
        recipe = path.parent / item["recipe"] if item.get("recipe") else None
        if recipe is not None and not recipe.is_file():
            raise DataError(f"{path}: row {item['name']!r}: {recipe} does not exist")
        rows.append(Row(item["name"], recipe, item.get("train_file")))
    if not rows or len({row.slug for row in rows}) != len(rows):
        raise DataError(f"{path}: expected rows with different names")
    return Table(rows, published.get("scores") or {}, published.get("source") or "", published.get("model") or "")


def _load(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a mapping")
    return value


def choose_rows(table: Table, names: Sequence[str]) -> list[Row]:
    """The rows asked for by name or slug, in table order; none named: all."""
    if not names:
        return table.rows
    known = {key: row for row in table.rows for key in (row.name, row.slug)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--rows {shlex.join(unknown)}: choose from {', '.join(row.slug for row in table.rows)}")
    chosen = {known[name].slug for name in names}
    return [row for row in table.rows if row.slug in chosen]


def cells(rows: Sequence[Row], languages: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """All cells, seed by seed, so that a whole table with one seed is there first."""
    for place, seed in enumerate(seeds):
        for row in rows:
            for lang in languages:
                if row.recipe is not None:
                    yield Cell(row, lang, seed)
                elif place == 0:
                    yield Cell(row, lang, None)


def stage_keys(options: Options, cell: Cell, fingerprints: dict[str, Any]) -> dict[str, str]:
    """Key of every stage of a cell, each over its inputs and the key before it.

    Args:
        fingerprints: stage -> what it reads (hashes of files, names of hub data sets).
    """
    keys: dict[str, str] = {}
    before = ""
    for stage in STAGES:
        if stage == "train" and cell.row.recipe is None:
            before = json.dumps(fingerprints["train"]["base_model"])
        else:
            before = keys[stage] = digest(stage, options.inputs(cell, stage), fingerprints[stage], before)
    return keys
