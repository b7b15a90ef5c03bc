"""Is a checkpoint damaged? Everything that going on reads is opened, so that damage is found before anything is loaded.

Contents of weights and optimizer stay on disk: their headers say whether the file was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from FlagEmbedding.finetune.resume.loss_window import WINDOW_FILE
from FlagEmbedding.finetune.resume.runs import RECORD_FILE, STATE_FILE, read_record
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

_FINGERPRINT = {"options", "facts", "config", "files", "batches"}


def undamaged(candidates: Sequence[Path], asked: str | bool | None) -> list[Path]:
    """The ``candidates`` that can be read; each of the others is passed over with a line.

    Args:
        candidates: checkpoints that have all their files, the newest first.
        asked: what the user said; a folder that is named must be right.

    Raises:
        UsageError: the named folder is damaged.
    """
    found = []
    for folder in candidates:
        if not (damage := _damage(folder)):
            found.append(folder)
        elif Path(str(asked)) == folder:
            raise UsageError(
                f"--resume_from_checkpoint {folder}: not a whole checkpoint ({damage}); give another, or True for the "
                "newest whole one in --output_dir"
            )
        else:
            logger.warning("%s is damaged (%s): passed over", folder, damage)
    recorded = [folder for folder in found if (folder / RECORD_FILE).is_file()]
    for folder in found[: found.index(recorded[0])] if recorded else ():
        logger.warning("%s has lost its %s: passed over", folder, RECORD_FILE)
        found = found[1:]
    if candidates and not found:
        logger.warning("no checkpoint can be read: starting at the first step")
    return found


def _damage(folder: Path) -> str:
    """Which file of a checkpoint cannot be read and why; empty: none."""
    for pattern, opens in _READERS.items():
        for path in folder.glob(pattern):
            try:
                opens(path)
            except Exception as error:  # noqa: BLE001 — each library has its own for a damaged file
                return f"{path.name} cannot be read: {_reason(error)}"
    return ""


def _state(path: Path) -> None:
    state = _object(path)
    if not isinstance(state.get("global_step"), int) or not isinstance(state.get("log_history"), list):
        raise ValueError("it does not say which step it is of")
    if not isinstance(state.get("train_batch_size"), int):
        raise ValueError("it does not say the batch size")


def _record(path: Path) -> None:
    record = read_record(path.parent)
    if record is None:
        raise ValueError("it is damaged, or of a later version")
    if not isinstance(record["fingerprint"], dict) or not record["fingerprint"].keys() >= _FINGERPRINT:
        raise ValueError("it does not say what decides the run")


def _window(path: Path) -> None:
    window = _object(path)
    if missing := {"sums", "counts", "zeros", "forwards", "loss_sum", "last_logged"} - window.keys():
        raise ValueError(f"it has no {min(missing)}")


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _weights(path: Path) -> None:
    with safe_open(path, "pt") as stored:
        stored.keys()


def _zipped(path: Path) -> None:
    # Random states hold arrays of numpy's, which torch reads only where it is told to trust them.
    torch.PyTorchFileReader(str(path))


def _pickled(path: Path) -> None:
    _zipped(path)
    torch.load(path, map_location="cpu", mmap=True, weights_only=True)


_READERS: dict[str, Callable[[Path], None]] = {
    STATE_FILE: _state,
    RECORD_FILE: _record,
    WINDOW_FILE: _window,
    "*.safetensors": _weights,
    "adapter/*.safetensors": _weights,
    "optimizer.pt": _pickled,
    "scheduler.pt": _pickled,
    "rng_state*.pth": _zipped,
}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:120]
