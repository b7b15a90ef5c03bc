"""A result that is a folder: it appears as a whole or not at all, and never over files of somebody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike, read_json, write_json_atomic


def write_record(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Say in ``folder/name`` how the folder was made, and which files are its own."""
    files = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} | {name})
    write_json_atomic(folder / name, {**value, "files": files})


def remove_named(folder: Path, *patterns: str) -> None:
    """Remove the files of ``folder`` that ``patterns`` name, and the folder unless something else is in it."""
    for path in {path for pattern in patterns for path in folder.glob(pattern)}:
        with suppress(OSError):  # a folder of that name, or one that has gone
            path.unlink()
    with suppress(OSError):  # not empty
        folder.rmdir()


def check_new_folder(target: PathLike, record: str, overwrite: bool) -> None:
    """Refuse a folder that is in the way.

    Args:
        record: file that :func:`write_record` writes in such a folder.
        overwrite: what the same command made before may be replaced.

    Raises:
        UsageError: it is a file, holds what is not the command's own, or a result that should stay.
    """
    folder = Path(target)
    if folder.is_dir():
        held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        own = _own_files(folder / record)
        if strange := sorted(held - own):
            raise UsageError(
                f"--output_dir {folder} holds {strange[0]!r}, which this command did not write: give a new or empty "
                "folder"
            )
        if held and not overwrite:
            raise UsageError(f"--output_dir {folder} is there already: --overwrite True replaces it")
    elif folder.exists():
        raise UsageError(f"--output_dir {folder} is a file: give a folder")


def _own_files(record: Path) -> set[str]:
    try:
        return set(read_json(record)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def new_folder(target: PathLike, record: str, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``target`` to write into, which takes its place when the block ends well; see above.

    Raises:
        UsageError: as :func:`check_new_folder`.
        DataError: the disk is full, or refuses.
    """
    check_new_folder(target, record, overwrite)
    folder = Path(target)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as workplace:
            draft = Path(workplace) / folder.name
            draft.mkdir()
            yield draft
            check_new_folder(target, record, overwrite)  # the work may have taken hours
            if folder.exists():
                os.replace(folder, Path(workplace) / "before")
            os.replace(draft, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error
