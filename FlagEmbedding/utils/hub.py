"""The one place that asks the hub: for a model's folder, or for files of a dataset. What is on disk is not asked for.

The hub's own cache and environment (``HF_HOME``, ``HF_HUB_OFFLINE``, tokens) hold; ``cache_dir`` puts files elsewhere.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# What a model's snapshot needs; the rest of a repository (ONNX, images) may be gigabytes.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*_linear.pt", "*_Pooling/*", "*_Dense/*", "README.md")


ADAPTER_CONFIG = "adapter_config.json"  # of a PEFT adapter (``utils.adapter_folder``)
_WAITS = (1, 4)  # seconds before a busy hub is asked again


class HubError(DataError):
    """The hub gave nothing; the text says why and what to do."""


def download(
    repo: str,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "dataset"] = "model",
    cache_dir: str | None = None,
    revision: str | None = None,
) -> Path:
    """The folder with those files of a hub repository that match ``patterns``, from the cache or the network.

    A hub that is busy or does not answer is asked again; what is in the cache then serves without it.

    Raises:
        HubError: no such repository, no network, no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    ask = partial(snapshot_download, repo, repo_type=kind, cache_dir=cache_dir, revision=revision)
    for wait in (*_WAITS, None):
        try:
            return Path(ask(allow_patterns=list(patterns)))
        except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]  # httpx's or requests'
            reason, passing = _reason(error)
            if wait is None or not passing:
                raise HubError(reason) from error
            logger.warning("%s: %s; asking again in %d s", repo, reason, wait)
        time.sleep(wait)
    raise AssertionError("the last round returns or raises")


def who_am_i(token: str | None = None) -> str:
    """The name of the hub's user whose token is given or kept on this machine. Raises ``HubError``."""
    from huggingface_hub import HfApi

    with _clear_errors():
        return str(HfApi().whoami(token=token)["name"])


def make_repository(name: str, token: str | None, private: bool | None) -> str:
    """A model repository of that name, made where it is not there: its name with its owner's. Raises ``HubError``."""
    from huggingface_hub import HfApi

    with _clear_errors():
        return str(HfApi().create_repo(name, token=token, private=private, exist_ok=True).repo_id)


def upload(folder: Path, repo: str, token: str | None, revision: str | None, ignore: Sequence[str]) -> str:
    """Put a folder's files into a model repository, in one commit: its address.

    Args:
        revision: a branch, made where it is not there; None: the main one.
        ignore: patterns of paths that stay behind.

    Raises:
        HubError: the hub did not take them.
    """
    from huggingface_hub import HfApi

    with _clear_errors():
        if revision is not None:
            HfApi().create_branch(repo, branch=revision, token=token, exist_ok=True)
        return str(
            HfApi().upload_folder(
                repo_id=repo, folder_path=folder, token=token, revision=revision, ignore_patterns=list(ignore),
                commit_message="Upload the trained checkpoint",
            )
        )  # fmt: skip


@contextmanager
def _clear_errors() -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set: unset it to upload") from error
    except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]  # httpx's or requests'
        if getattr(getattr(error, "response", None), "status_code", None) == 403:
            raise HubError("the token may not write there (403): make one that may, or choose another name") from error
        raise HubError(_reason(error)[0]) from error


def _reason(error: BaseException) -> tuple[str, bool]:
    """What is wrong and what to do about it, and whether it may pass by itself."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "it is not in the cache, and HF_HUB_OFFLINE is set", False
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return "nobody is logged in: `hf auth login`, HF_TOKEN or --hub_token", False
        if isinstance(cause, errors.RevisionNotFoundError):
            return "the repository has no such revision", False
        if isinstance(cause, errors.GatedRepoError) or status == 403:
            return "no permission (403): accept its terms on its page there, and log in (`hf auth login`)", False
        if status in (401, 404):
            return f"no repository of that name to be seen ({status}): check the name; if it is private, log in", False
        if status is not None:
            return f"the hub is busy or out of order ({status})", status == 429 or status >= 500
        if "Timeout" in type(cause).__name__:
            return f"the hub does not answer ({type(cause).__name__})", True
        if "Connect" in type(cause).__name__ or "Proxy" in type(cause).__name__:
            return f"the hub cannot be reached ({type(cause).__name__}): check the network and HF_ENDPOINT", False
        cause = cause.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0], False


def resolve_folder(
    name_or_path: PathLike,
    *,
    cache_dir: str | None = None,
    revision: str | None = None,
    hint: str = "or download it first and give the folder",
) -> Path:
    """The local folder of a checkpoint: the path itself, or the snapshot of a hub id (downloaded where needed).

    Args:
        hint: what the user should do where neither is there.

    Raises:
        UsageError: neither a folder nor a repository that can be reached.
    """
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
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
        raise UsageError(f"{name} is not a folder here, and the hub did not give it: {error}; {hint}") from error
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
