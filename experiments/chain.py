"""The commands of a grid and which of them are done.

A stage is one public command. Its key is a hash over everything that decides its product: options, contents of the
files that it reads, keys of the stages before. A stage whose recorded key is the present one and whose product is there
is not run again, so a killed grid goes on where it was, and a changed option runs what depends on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grid import BASE, NEXT, Collection, Grid, Options, Row
from FlagEmbedding.collections import miracl
from FlagEmbedding.finetune.resume.runs import checkpoints, remove_checkpoint
from FlagEmbedding.retrieval.index import index_name, remove_index
from FlagEmbedding.utils.commands import run_command
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import digest, fingerprints, model_fingerprint
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(f"FlagEmbedding.{__name__}")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """One command. ``product`` is the file whose presence says that it ended well."""

    id: str
    command: list[str]
    product: Path
    key: str


@dataclass(frozen=True)
class Cell:
    """A row's model, made for one collection with one seed, scored on one collection.

    ``collection`` and ``seed`` are None for the base, which is made for none.
    """

    row: Row
    collection: Collection | None
    seed: int | None
    scored_on: Collection

    def __str__(self) -> str:
        made = "" if self.collection is None else f", {self.collection.name}, seed {self.seed}"
        return f"{self.row.name}{made}, on {self.scored_on.name}"


class Chain:
    """The stages of a grid's cells, with their keys.

    Args:
        output_dir: models, indexes, runs, records and logs.

    Raises:
        DataError: the base is a folder that is not there.
    """

    def __init__(self, grid: Grid, output_dir: Path) -> None:
        self.grid, self.output_dir = grid, output_dir
        base = Path(grid.base)
        if not base.is_dir() and grid.base.startswith((".", "/")):
            raise DataError(
                f"{grid.path}: base: {grid.path.parent / base} is no folder; the first lines say how it is made"
            )
        self._base_key = digest("base", model_fingerprint(base) if base.is_dir() else grid.base)

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that a whole table with one seed is there first."""
        for place, seed in enumerate(self.grid.seeds):
            for row in self.grid.rows:
                for made_for in self.grid.collections:
                    for scored_on in self.grid.collections:
                        if row.name == BASE and place == 0 and scored_on is made_for:
                            yield Cell(row, None, None, scored_on)
                        elif row.name != BASE and (self.grid.elsewhere or scored_on is made_for):
                            yield Cell(row, made_for, seed, scored_on)

    def model(self, row: Row, collection: Collection | None, seed: int | None) -> str:
        """Folder (or hub id) of a row's model."""
        if row.name == BASE or collection is None:
            return self.grid.base
        return str(self.output_dir / "models" / f"{row.slug}-{collection.name}-seed{seed}")

    def model_stages(self, row: Row, collection: Collection | None, seed: int | None) -> list[Stage]:
        """What makes a row's model, what it is made of first; empty for the base."""
        if collection is None or seed is None or row.name == BASE:
            return []
        folder = Path(self.model(row, collection, seed))
        if row.data:
            return [self._train(row, collection, seed, folder)]
        named = {each.name: each for each in self.grid.rows}
        after = self.grid.seeds[(self.grid.seeds.index(seed) + 1) % len(self.grid.seeds)]
        sources = {
            name: (named[name.removesuffix(NEXT)], after if name.endswith(NEXT) else seed)
            for name in ([row.fold] if row.fold else row.merge)
        }
        before = [self.model_stages(each, collection, its) for each, its in sources.values()]
        models = [self.model(each, collection, its) for each, its in sources.values()]
        texts: list[Path] = []
        if row.fold:
            texts = [next(iter(collection.data.values()))]  # which experts these choose weighs them
            words = ["FlagEmbedding.export", "fold", *models, "--method", row.method or "load", "--data", str(texts[0])]
        else:
            words = ["FlagEmbedding.merge", *models, "--weights", *(str(row.merge[name]) for name in sources)]
        keys = [stages[-1].key if stages else self._base_key for stages in before]
        key = digest("make", dict(row.merge), row.method, fingerprints(texts), keys)
        words += ["--output_dir", str(folder), "--overwrite", "True"]
        made = Stage(folder.name, [sys.executable, "-m", *words], folder / "config.json", key)
        return [*{stage.id: stage for stages in before for stage in stages}.values(), made]

    def _train(self, row: Row, collection: Collection, seed: int, folder: Path) -> Stage:
        file = collection.data[row.data or ""]
        options = {**self.grid.train, **collection.train, **(row.train or {}), "seed": seed}
        words = ["--model_name_or_path", self.grid.base, "--train_data", str(file), "--output_dir", str(folder)]
        words += [*_words(options), "--resume_from_checkpoint", "True"]
        key = digest("train", options, fingerprints([file]), self._base_key)
        return Stage(
            folder.name, [sys.executable, str(ROOT / "run.py"), *words], folder / "config.json", key
        )  # fmt: skip

    def score_stages(self, cell: Cell) -> tuple[Stage, Stage]:
        """Index and search of a cell's model on the collection that it is scored on."""
        of, grid = cell.scored_on, self.grid
        model = self.model(cell.row, cell.collection, cell.seed)
        made = self.model_stages(cell.row, cell.collection, cell.seed)
        name, key = index_name(model), made[-1].key if made else self._base_key
        common = ["--encoder", model, "--languages", of.language, "--split", of.split, "--data_dir", str(of.data_dir)]
        places = ["--index_save_dir", str(self.output_dir / "indexes" / of.name)]
        runs = self.output_dir / "runs" / of.name
        index_options, search_options = {**grid.index, **of.index}, {**grid.search, **of.search}
        corpus = fingerprints(miracl.corpus_files(of.language, of.data_dir))
        topics = fingerprints([miracl.topics_file(of.language, of.split, of.data_dir)])
        index_key = digest("index", index_options, corpus, key)
        scripts = [[sys.executable, str(ROOT / "evaluation" / script), *common, *places] for script in _SCRIPTS]
        index = Stage(
            f"{name}.on-{of.name}.index", [*scripts[0], "--overwrite", "True", *_words(index_options)],
            self.output_dir / "indexes" / of.name / name / of.language / "index", index_key,
        )  # fmt: skip
        search = Stage(
            f"{name}.on-{of.name}.search", [*scripts[1], "--result_save_dir", str(runs), *_words(search_options)],
            runs / name / f"{of.language}.txt", digest("search", search_options, topics, index_key),
        )  # fmt: skip
        return index, search

    def stages(self, cell: Cell) -> list[Stage]:
        """All commands of a cell, in order."""
        return [*self.model_stages(cell.row, cell.collection, cell.seed), *self.score_stages(cell)]

    def missing(self, cell: Cell) -> list[Stage]:
        """Those that are to be run; nothing where the run file is there that everything else leads to."""
        stages = self.stages(cell)
        return [] if self.done(stages[-1]) else [stage for stage in stages if not self.done(stage)]

    def run(self, cell: Cell, place: str) -> dict[str, Any]:
        """Run what is not done of a cell's commands; returns their :meth:`records`.

        Raises:
            DataError: a command failed, with its last words.
        """
        for stage in self.missing(cell):
            self._run(stage, place)
        remove_index(self.score_stages(cell)[0].product.parent)  # large, and quickly made again
        return self.records(cell)

    def records(self, cell: Cell) -> dict[str, Any]:
        """Stage → key, command, seconds and peak memory."""
        return {stage.id: self._record(stage) for stage in self.stages(cell)}

    def done(self, stage: Stage) -> bool:
        """Whether a stage ended well with the present inputs."""
        record = self._record(stage)  # without seconds it was begun and not ended
        return stage.product.exists() and record.get("key") == stage.key and "seconds" in record

    def _run(self, stage: Stage, place: str) -> None:
        if self._record(stage).get("key", stage.key) != stage.key:
            self._clear(stage)
        logger.info("[%s] %s", place, stage.id)
        # Noted before it begins, so that what is left of other inputs is cleared and what is left of these goes on.
        write_json_atomic(self._path(stage), {"key": stage.key})
        found = run_command(stage.command, self.output_dir / "logs" / f"{stage.id}.log", stage.id)
        write_json_atomic(self._path(stage), {"key": stage.key, **found})

    def _clear(self, stage: Stage) -> None:
        """Remove what other inputs left (step 0 sees to its own index)."""
        if stage.command[1].endswith("run.py"):
            for checkpoint in checkpoints(stage.product.parent):
                remove_checkpoint(checkpoint)
                with suppress(OSError):  # files that no run has written are in it
                    checkpoint.rmdir()
        if not stage.id.endswith(".index"):
            stage.product.unlink(missing_ok=True)

    def _path(self, stage: Stage) -> Path:
        return self.output_dir / "records" / f"{stage.id}.json"

    def _record(self, stage: Stage) -> dict[str, Any]:
        try:
            value = json.loads(self._path(stage).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path(stage)}: not a readable record ({error}); delete it to run again") from error
        return value if isinstance(value, dict) else {}


_SCRIPTS = ("step0-generate_embedding.py", "step1-search_results.py")


def _words(options: Options) -> list[str]:
    """Options of a mapping as words of a command line; lists become several words."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")  # one word, since a text may start with a dash
    return words
