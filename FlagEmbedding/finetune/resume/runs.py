"""Runs and the folders that they write: every run has an id, and every checkpoint says whose it is.

A checkpoint is written into a draft folder beside the others and moved into place whole; its record (``run.json``)
holds the run's id and fingerprint and lists the files that were written, so that what is deleted later (the oldest of
a run, or another run's under ``--overwrite_output_dir True``) is never anybody else's.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.io import read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

RECORD_FILE = "run.json"
STATE_FILE = "trainer_state.json"  # the Trainer writes it last, so that it vouches for the rest of a checkpoint
_FORMAT, _KEYS = 1, {"run_id", "fingerprint", "changes", "files"}
_DRAFTS = ".saving-"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*_linear.pt")
_OF_A_RUN = ("training_args.json", "training_args.bin")  # beside the weights that a run (or one of before) has saved


@dataclass
class Run:
    """One run, over all the starts that it takes.

    Attributes:
        id: made at its first start, the same for all processes and in all its checkpoints.
        fingerprint: what decides it, as JSON values.
        changes: what ``--resume_anyway`` changed, by the step that it went on from.
    """

    id: str
    fingerprint: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def draft(self, output_dir: Path) -> Path:
        """Where this run's checkpoints are written before they are moved into place."""
        return output_dir / f"{_DRAFTS}{self.id}"

    def describe(self, folder: Path) -> None:
        """Write the record of the checkpoint that ``folder`` holds, which lists what else is in there."""
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        content = {"run_id": self.id, "fingerprint": self.fingerprint, "changes": self.changes}
        write_json_atomic(folder / RECORD_FILE, {"format": _FORMAT, **content, "files": sorted(files)})


def new_id() -> str:
    """Time (UTC) and six random digits."""
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None where it has none (of an older version, or of another program)."""
    try:
        record = read_json(folder / RECORD_FILE)
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and record.get("format") == _FORMAT and record.keys() >= _KEYS
    return record if known else None


def run_of(folder: Path) -> str | None:
    """The id of the run that wrote a checkpoint, None where it does not say."""
    record = read_record(folder)
    return None if record is None else str(record["run_id"])


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint-N of a folder, whole or not, by N."""
    named = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted((folder for folder in named if folder.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def foreign(output_dir: Path, own: str | None = None) -> list[Path]:
    """The checkpoints in ``output_dir`` that say they are of another run than ``own``; None: all there are."""
    return [folder for folder in checkpoints(output_dir) if own is None or run_of(folder) not in (own, None)]


def refuse_foreign(output_dir: Path, others: list[Path], overwrite: bool) -> None:
    """Refuse to write among checkpoints of another run, or those that cannot be removed when told to.

    Raises:
        UsageError: nothing was changed.
    """
    if not others:
        return
    names = ", ".join(folder.name for folder in others[:3]) + (", …" if len(others) > 3 else "")
    if not overwrite:
        raise UsageError(
            f"--output_dir {output_dir} holds checkpoints of another run ({names}): go on with it "
            "(--resume_from_checkpoint True), name another folder, or have its checkpoints removed "
            "(--overwrite_output_dir True)"
        )
    if unknown := [folder for folder in others if read_record(folder) is None]:
        raise UsageError(
            f"--overwrite_output_dir: {unknown[0]} has no {RECORD_FILE} that says which files in it a run has written, "
            "so nothing was removed; remove it yourself, or name another --output_dir"
        )


def refuse_other_model(output_dir: Path, resumes: bool) -> None:
    """Refuse to write over a model that no run of this program wrote; one of an earlier run is replaced, with a line.

    Raises:
        UsageError: nothing was changed.
    """
    weights = sorted(path.name for pattern in _WEIGHTS for path in output_dir.glob(pattern))
    if not weights:
        return
    if not any((output_dir / name).is_file() for name in _OF_A_RUN):
        raise UsageError(
            f"--output_dir {output_dir} holds {weights[0]}, which no run of this program wrote and this one would "
            "replace: name another folder, or move it away"
        )
    if not resumes:
        logger.warning("--output_dir %s holds the model of an earlier run, which this one will replace", output_dir)


def remove_drafts(output_dir: Path) -> None:
    """Remove what kills in the middle of saving left, be it of a run that has no checkpoint yet."""
    for draft in output_dir.glob(f"{_DRAFTS}*"):
        if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", draft.name.removeprefix(_DRAFTS)):
            shutil.rmtree(draft, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove the files that the record of a checkpoint lists, and the folder when nothing else is in there."""
    record = read_record(folder)
    if record is None:
        logger.warning("%s has no %s: left as it is", folder, RECORD_FILE)
        return
    (folder / STATE_FILE).unlink(missing_ok=True)  # first: half a checkpoint must not pass for a whole one
    root = folder.resolve()
    for name in [*record["files"], RECORD_FILE]:
        path = folder / name
        if path.parent.resolve().is_relative_to(root):
            path.unlink(missing_ok=True)
    for inner in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        if not any(inner.iterdir()):
            inner.rmdir()
    if any(folder.iterdir()):
        logger.warning("%s holds files that no run has written: they stay", folder)
    else:
        folder.rmdir()
        logger.info("%s is removed", folder)


def publish(draft: Path, target: Path) -> None:
    """Move a checkpoint that is written to its place, whole; what others put into an older one there stays."""
    replaced = None
    if target.exists():
        record = read_record(target)
        replaced = draft.with_name(f"{draft.name}.replaced")
        if record is None:  # nothing says which of its files are a run's
            replaced = target.with_name(f"{target.name}.before-{draft.parent.name.removeprefix(_DRAFTS)}")
            logger.warning("%s is of a run that is not known: kept as %s", target, replaced.name)
        os.replace(target, replaced)
    os.replace(draft, target)
    if replaced is not None and replaced.parent == draft.parent:
        ours = {*record["files"], RECORD_FILE}  # type: ignore[index]
        for path in [p for p in replaced.rglob("*") if p.is_file()]:
            name = path.relative_to(replaced)
            if name.as_posix() not in ours and not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target / name)
        shutil.rmtree(replaced)
    if draft.parent.exists() and not any(draft.parent.iterdir()):
        draft.parent.rmdir()


def keep_newest(output_dir: Path, run_id: str, number: int | None, best: str | None = None) -> None:
    """Remove a run's own oldest checkpoints, so that ``number`` stay (``--save_total_limit``); None: all stay.

    The ``best`` one stays whatever its age.
    """
    if number is None or number <= 0:
        return
    own = [folder for folder in checkpoints(output_dir) if run_of(folder) == run_id]
    # By the time of writing: a run that goes on from an older checkpoint writes small numbers after greater ones.
    own.sort(key=lambda folder: ((folder / RECORD_FILE).stat().st_mtime_ns, step_of(folder)))
    for folder in own[:-number]:
        if str(folder) == best:
            continue
        remove_checkpoint(folder)


@contextmanager
def writing(folder: Path, output_dir: Path) -> Iterator[None]:
    """Turn what a full disk (or a quota, or a lost mount) does to whoever writes ``folder`` into one line.

    Raises:
        UserError: it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer has no class of its own, and does not say what the system said.
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|inline_container|basic_ios", str(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        with_room = next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists())
        room = shutil.disk_usage(with_room).free / 2**20
        raise UserError(
            f"{folder}: could not be written ({reason}; {room:,.0f} MiB are free there). Earlier checkpoints are as "
            "they were: make room, then go on with --resume_from_checkpoint True"
        ) from error
