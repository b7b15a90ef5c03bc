"""A grid as its YAML file says it: what is trained and made, on which collections, by which seeds; what is tested.

base: path/or/hub-id               # the row "base"; paths are relative to this file
seeds: [1, 2, 3]
measures: [ndcg@10, recall@20]     # the first one is tested
train: {max_steps: 50, …}          # options of run.py for every trained row
index: {max_passage_length: 160}   # options of step 0
search: {hits: 100}                # options of step 1
choose: 0.5                        # share of the judged queries that choices are made on (by hash of the qid)
elsewhere: true                    # every model is scored on the other collections, too
collections:
  help: {data_dir: …, language: ko, split: dev, data: {mined: rows.jsonl}, train: {…}, index: {…}, search: {…}}
rows:
  - {name: plain, data: mined, train: {penalty_weight: 0}}
  - {name: half, merge: {base: 0.5, plain: 0.5}}      # plain@next: the same row with the next seed
  - {name: folded, fold: plain, method: average}
reference: base                    # what every row is tested against
tests: [[plain, half]]             # further pairs: the second minus the first
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from FlagEmbedding.evaluation.metrics import Measure, parse_measures
from FlagEmbedding.utils.errors import DataError

BASE, NEXT = "base", "@next"
Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the tables: the base, a training, a merge of earlier rows, or an earlier row with its experts folded.

    Attributes:
        data: which of a collection's training files.
        merge: row (or ``row@next``) → weight.
        fold, method: the row whose experts are folded, and how.
    """

    name: str
    data: str | None = None
    train: Options | None = None
    merge: Mapping[str, float] = field(default_factory=dict)
    fold: str | None = None
    method: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")

    @property
    def sources(self) -> list[str]:
        """Names of the rows that this one is made of."""
        return [self.fold] if self.fold else [name.removesuffix(NEXT) for name in self.merge]


@dataclass(frozen=True, eq=False)
class Collection:
    """A corpus with judged queries in the layout that step 0 to 2 read, and training files for it."""

    name: str
    data_dir: Path
    language: str
    split: str = "dev"
    data: Mapping[str, Path] = field(default_factory=dict)
    train: Options = field(default_factory=dict)
    index: Options = field(default_factory=dict)
    search: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The whole file, checked."""

    path: Path
    base: str
    seeds: list[int]
    rows: list[Row]
    collections: list[Collection]
    measures: list[Measure]
    pairs: list[tuple[str, str]]
    train: Options
    index: Options
    search: Options
    choose: float | None
    elsewhere: bool


def read_grid(path: Path) -> Grid:
    """Read and check a grid.

    Raises:
        DataError: it cannot be read, or something in it does not fit; the line names what.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    known = {"base", "seeds", "measures", "train", "index", "search", "choose", "elsewhere", "collections", "rows"}
    _check_keys(path, value, known | {"reference", "tests"}, {"base", "collections", "rows"})
    given = _mapping(path, "collections", value["collections"])
    collections = [_collection(path, name, each) for name, each in given.items()]
    if not isinstance(value["rows"], list) or not collections:
        raise DataError(f"{path}: expected rows as a list and one collection or more")
    rows = [Row(BASE), *(_row(path, place, each) for place, each in enumerate(value["rows"], 1))]
    _check_rows(path, rows, collections)
    seeds = value.get("seeds", [42])
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
    if not whole or not seeds or len({*seeds}) != len(seeds):
        raise DataError(f"{path}: seeds: expected a list of different whole numbers, found {str(seeds)[:80]}")
    choose = value.get("choose")
    if choose is not None and not (isinstance(choose, float) and 0 < choose < 1):
        raise DataError(f"{path}: choose: expected a share between 0 and 1, found {choose!r}")
    measures = value.get("measures", ["ndcg@10"])
    if not isinstance(measures, list) or not all(isinstance(each, str) for each in measures) or not measures:
        raise DataError(f"{path}: measures: expected a list such as [ndcg@10], found {str(measures)[:80]}")
    base = str(value["base"])
    local = path.parent / base
    train, index, search = (_mapping(path, key, value.get(key) or {}) for key in ("train", "index", "search"))
    return Grid(
        path, str(local.resolve()) if local.is_dir() else base, seeds, rows, collections,
        parse_measures(measures), _pairs(path, value, rows), train, index, search, choose,
        bool(value.get("elsewhere", False)),
    )  # fmt: skip


def _check_keys(path: Path, value: Any, known: set[str], needed: set[str], where: str = "") -> None:
    if not isinstance(value, dict) or not needed <= value.keys() <= known:
        found = sorted(map(str, value)) if isinstance(value, dict) else str(value)[:80]
        raise DataError(f"{path}: {where}expected a mapping of {', '.join(sorted(known))}, found {found}")


def _check_texts(path: Path, where: str, value: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if not isinstance(value.get(key, ""), str):
            raise DataError(f"{path}: {where}: {key}: expected a text, found {str(value[key])[:80]}")


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{path}: {key}: expected a mapping, found {str(value)[:80]}")
    return value


def _collection(path: Path, name: str, value: Any) -> Collection:
    known = {"data_dir", "language", "split", "data", "train", "index", "search"}
    _check_keys(path, value, known, {"data_dir", "language"}, f"collection {name}: ")
    if not re.fullmatch(r"[\w.-]+", name):
        raise DataError(f"{path}: collection {name!r}: its name becomes part of file names: letters, digits, . _ -")
    _check_texts(path, f"collection {name}", value, ("data_dir", "language", "split"))
    files = {key: path.parent / str(place) for key, place in _mapping(path, "data", value.get("data") or {}).items()}
    for place in [path.parent / value["data_dir"], *files.values()]:
        if not place.exists():
            raise DataError(f"{path}: collection {name}: {place} does not exist")
    options = {key: _mapping(path, key, value.get(key) or {}) for key in ("train", "index", "search")}
    folder = (path.parent / value["data_dir"]).resolve()
    return Collection(name, folder, value["language"], value.get("split", "dev"), files, **options)


def _row(path: Path, place: int, value: Any) -> Row:
    _check_keys(path, value, {"name", "data", "train", "merge", "fold", "method"}, {"name"}, f"row {place}: ")
    kinds = [key for key in ("data", "merge", "fold") if value.get(key)]
    if len(kinds) != 1 or ("train" in value and kinds != ["data"]) or ("method" in value and kinds != ["fold"]):
        raise DataError(f"{path}: row {value['name']!r}: expected data (with train), merge, or fold (with method)")
    _check_texts(path, f"row {value['name']!r}", value, ("data", "fold", "method"))
    _mapping(path, f"row {value['name']!r}: train", value.get("train", {}))
    row = Row(**{**value, "name": str(value["name"])})
    weights = _mapping(path, f"row {row.name!r}: merge", row.merge)
    if weights and not (len(weights) > 1 and all(isinstance(w, int | float) for w in weights.values())):
        raise DataError(f"{path}: row {row.name!r}: merge: expected two or more rows with their weights")
    return row


def _check_rows(path: Path, rows: list[Row], collections: list[Collection]) -> None:
    seen: set[str] = set()
    for row in rows:
        missing = [name for name in row.sources if name not in seen]
        if missing:
            raise DataError(f"{path}: row {row.name!r}: {missing[0]!r} is no row above it")
        without = [each.name for each in collections if row.data and row.data not in each.data]
        if without:
            raise DataError(f"{path}: row {row.name!r}: collection {without[0]} has no data {row.data!r}")
        seen.add(row.name)
    if len({row.slug for row in rows}) != len(rows):
        raise DataError(f"{path}: expected rows with different names, none of them {BASE!r}")


def _pairs(path: Path, value: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    names = [row.name for row in rows]
    reference = value.get("reference", BASE)
    given = value.get("tests") or []
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise DataError(f"{path}: tests: expected pairs of rows, found {str(given)[:80]}")
    pairs = [(reference, name) for name in names if name not in (reference, BASE)] + [(a, b) for a, b in given]
    for name in {name for pair in pairs for name in pair}:
        if name not in names:
            raise DataError(f"{path}: {name!r} is to be tested and is no row: choose from {', '.join(names)}")
    return list(dict.fromkeys(pairs))
