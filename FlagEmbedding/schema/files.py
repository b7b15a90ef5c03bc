"""Which files of rows a command's paths name: files as given, what a folder holds, saved datasets, ids of the hub."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from FlagEmbedding.schema.problems import Problems
from FlagEmbedding.schema.tables import hub_files, is_saved, is_table, names_dataset, saved_files
from FlagEmbedding.utils.io import PathLike, packing
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

SUFFIXES = (".json", ".jsonl")
_SHOWN_NAMES = 5
_OTHERS = {  # what cannot be read as rows, whatever it holds
    **dict.fromkeys((".csv", ".tsv"), "python -m FlagEmbedding.mining convert --format triples makes rows of it"),
    **dict.fromkeys(
        (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4", ".br", ".zstd"),
        "unpack it; .gz and .zst are read as they are",
    ),
    **dict.fromkeys((".feather", ".xlsx", ".orc"), "save it as .jsonl or .parquet"),
}


@dataclass(frozen=True)
class DataFile:
    """A file of training rows (or a dataset) and the folder, as the user named it, that it counts to."""

    path: str
    folder: str


def find_files(paths: Sequence[PathLike], problems: Problems) -> list[DataFile]:
    """The data files that ``paths`` name: files as given, and those of folders, sorted by name.

    In a folder the files of JSON (.json, .jsonl, also .gz and .zst), Parquet and Arrow are data. Folders are not
    searched recursively and hidden files are passed over; whatever else is not read is named in one line of the log. A
    folder that ``datasets`` saved, and a dataset of the hub (``owner/name``, ``owner/name:configuration``), are their
    Arrow files. What is missing or empty goes to ``problems``.
    """
    files: list[DataFile] = []
    for given in map(str, paths):
        path = Path(given)
        if os.path.isdir(given):
            files += _of_folder(given, path, {Path(other).resolve() for other in paths}, problems)
        elif os.path.exists(given):
            if (ending := path.suffix.lower()) in _OTHERS:
                problems.report(given, 0, "", f"is a {ending} file", _OTHERS[ending])
            else:
                files.append(DataFile(str(path), str(path.parent)))
        elif names_dataset(given):
            files += _of_dataset(given, None, problems)
        else:
            problems.report(given, 0, "", "there is no such file or folder", "check the path")
    return files


def _of_folder(given: str, path: Path, named: Collection[Path], problems: Problems) -> list[DataFile]:
    if is_saved(path):
        return _of_dataset(given, path, problems)
    if (path / "dataset_dict.json").is_file():  # several splits, as datasets saves them
        if is_saved(path / "train"):
            return _of_dataset(given, path / "train", problems)
        found = "the folder holds a saved dataset without a split train"
        problems.report(given, 0, "", found, "name the folder of one split")
        return []
    inside, others = _listing(path, named)
    more = f" and {len(others) - _SHOWN_NAMES} more" if len(others) > _SHOWN_NAMES else ""
    shown = ", ".join(others[:_SHOWN_NAMES]) + more
    for link in [p for p in inside if not p.exists()]:
        problems.report(str(link), 0, "", f"is a link to {os.readlink(link)}, which is not there", "fetch it")
    if not inside:
        hint = "put the training rows there, one JSON object a line" + f", or name them: it has {shown}" * bool(others)
        problems.report(given, 0, "", "the folder holds no .json or .jsonl file", hint)
    elif others:
        logger.warning("%s: not read: %s (name what should be read too)", given, shown)
    return [DataFile(str(p), str(path)) for p in inside if p.exists()]


def _of_dataset(given: str, saved: Path | None, problems: Problems) -> list[DataFile]:
    """The files of a dataset: of that in the folder ``saved``, or of the hub's."""
    try:
        files = hub_files(given) if saved is None else saved_files(saved)
    except OSError as error:
        what = "there is no such file, folder or dataset" if saved is None else "the saved dataset cannot be read"
        problems.report(given, 0, "", f"{what} ({error})", "check the path")
        return []
    if not files:
        problems.report(given, 0, "", "the dataset is empty", "give one with rows")
    return [DataFile(str(file), given) for file in files]


def _listing(folder: Path, named: Collection[Path]) -> tuple[list[Path], list[str]]:
    """The data files of a folder, and the names of what else is there; one that is ``named`` by itself is neither."""
    visible = sorted(p for p in folder.iterdir() if p.name[0] != ".")
    plain = {p.stem for p in visible if p.suffix in SUFFIXES and p.is_file()}
    inside, others = [], []
    for p in visible:
        bare = Path(p.name[: -len(packing(p)) or None])
        data = bare.suffix.lower() in SUFFIXES or is_table(p.name)
        if p.is_symlink() and not p.exists() and data:
            inside.append(p)  # rows are missing: its reader says so
        elif not p.is_file():
            others.append(f"{p.name}/" if p.is_dir() else p.name)
        elif p.suffix in SUFFIXES:
            inside.append(p)
        elif data and bare.stem not in plain:
            plain.add(bare.stem)  # the same rows in another form are not read twice
            if p.resolve() not in named:
                inside.append(p)
        elif p.resolve() not in named:
            others.append(p.name)
    return inside, others
