"""PEFT's adapter folders: what they hold besides the adapter's weights comes from the base that they name."""

from __future__ import annotations

from pathlib import Path

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import ADAPTER_CONFIG, resolve_folder
from FlagEmbedding.utils.io import PathLike, read_json


def is_adapter(folder: PathLike) -> bool:
    """True for a folder with an adapter alone; a merged checkpoint may have one beside its weights."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: PathLike, cache_dir: str | None = None) -> Path:
    """The folder of the base that the adapter in ``folder`` was trained on.

    Raises:
        DataError: the adapter names none, or one that is not there.
    """
    file = Path(folder) / ADAPTER_CONFIG
    try:
        said = read_json(file)
        name = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not name or Path(name).resolve() == Path(folder).resolve():
        raise DataError(f"{file} names no base: write its hub id or folder into base_model_name_or_path")
    try:
        return resolve_folder(name, cache_dir=cache_dir)
    except UsageError as error:
        raise DataError(f"{file}: the base of this adapter: {error} (base_model_name_or_path says so)") from error


def files_of(folder: PathLike, *names: str, cache_dir: str | None = None) -> Path:
    """The folder with a checkpoint's files: ``folder``, or where an adapter has none of ``names``, its base's."""
    found = Path(folder)
    while is_adapter(found) and not any((found / name).is_file() for name in names):
        found = base_of(found, cache_dir)
    return found
