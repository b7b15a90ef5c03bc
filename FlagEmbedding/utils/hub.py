"""The one place that asks the hub: for a model's folder, or for files of a dataset. What is on disk is not asked for.

The hub's own cache and environment (``HF_HOME``, ``HF_HUB_OFFLINE``, tokens) hold; ``cache_dir`` puts files elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# What a model's snapshot needs; the rest of a repository (ONNX, images) may be gigabytes.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*_linear.pt", "*_Pooling/*", "*_Dense/*")


class HubError(DataError):
    """The hub gave nothing; the text is its own first line."""


def download(
    repo: str,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "dataset"] = "model",
    cache_dir: str | None = None,
    revision: str | None = None,
) -> Path:
    """The folder with those files of a hub repository that match ``patterns``, from the cache or the network.

    Raises:
        HubError: no such repository, no network, no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                repo, repo_type=kind, cache_dir=cache_dir, revision=revision, allow_patterns=list(patterns)
            )
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise HubError((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def resolve_folder(
    name_or_path: PathLike,
    *,
    cache_dir: str | None = None,
    revision: str | None = None,
    hint: str = "check the name, or download it first and give the folder",
) -> Path:
    """The local folder of a checkpoint: the path itself, or the snapshot of a hub id (downloaded where needed).

    Args:
        hint: what the user should do where neither is there.

    Raises:
        UsageError: neither a folder nor a repository that can be reached.
    """
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no checkpoint: it holds no config.json")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"{name} is neither a checkpoint folder nor a hub id")
    try:
        found = download(name, MODEL_FILES, cache_dir=cache_dir, revision=revision)
        if not list(found.glob("*.safetensors")):
            # Older repositories, BAAI/bge-m3 among them, hold a pickle alone; it is read with weights_only.
            found = download(name, [*MODEL_FILES, "pytorch_model*.bin"], cache_dir=cache_dir, revision=revision)
    except HubError as error:
        reason = type(error.__cause__).__name__
        raise UsageError(
            f"{name} is not a folder here, and the hub did not give a repository of that name ({reason}): {hint}"
        ) from error
    return found


def resolve_dataset(
    repo: str,
    relative: str,
    *,
    pattern: str | None = None,
    places: Sequence[Path] = (),
    cache_dir: str | None = None,
) -> Path:
    """A file or folder of a dataset: below the first of ``places`` that has it, else from the hub.

    Args:
        repo: the dataset's name on the hub.
        relative: where it lies in the repository, and below each place.
        pattern: what to download of a folder, such as ``{folder}/docs-*.jsonl.gz``.

    Raises:
        HubError: it is in none of them.
    """
    for place in places:
        if (place / relative).exists():
            return place / relative
    if places:
        logger.info("%s is not in %s: asking the hub", relative, places[0])
    found = download(repo, [pattern or relative], kind="dataset", cache_dir=cache_dir) / relative
    if not found.exists():
        raise HubError("the dataset holds no such file")
    return found
