"""What a checkpoint must hold for an exact continuation, and which one a run goes on from.

A checkpoint is moved into place whole (``runs.py``). Those of earlier versions were written in place, their
trainer_state.json last: a folder in which that does not parse is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from FlagEmbedding.finetune.arguments import RetrieverTrainingArguments
from FlagEmbedding.finetune.resume.fingerprint import Differences, Fingerprint, compare
from FlagEmbedding.finetune.resume.runs import (
    STATE_FILE,
    Run,
    checkpoints,
    foreign,
    new_id,
    read_record,
    refuse_foreign,
    remove_checkpoint,
    remove_drafts,
    step_of,
)
from FlagEmbedding.utils.adapter_folder import is_adapter
from FlagEmbedding.utils.distributed import gather_objects, local_rank
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main

logger = get_logger(__name__)

_YES, _NO = {"true", "y", "yes", "1"}, {"false", "n", "no", "0"}
Start = tuple[Run, Path | None]
_NEEDED = ("optimizer.pt", "scheduler.pt")


def resumable(resume: str | bool | None, output_dir: Path, sharded: bool = False) -> list[Path]:
    """The checkpoints that a run may go on from, the newest first; none: it starts at the first step.

    Args:
        resume: what the user said: nothing, a folder, or a yes for the newest that fits of ``output_dir``.
        sharded: the run uses FSDP or DeepSpeed, whose checkpoints hold other files.

    Raises ``UsageError`` where the named folder is no whole checkpoint.
    """
    if not wants_to_resume(resume):
        return []
    if str(resume).lower() in _YES:
        whole = []
        for folder in reversed(checkpoints(output_dir)):
            if missing := _missing(folder, sharded):
                logger.warning("%s is not whole (%s): passed over", folder, missing)
            else:
                whole.append(folder)
        if not whole:
            logger.warning("%s holds no whole checkpoint: starting at the first step", output_dir)
        return whole
    folder = Path(str(resume))
    if missing := _missing(folder, sharded):
        raise UsageError(
            f"--resume_from_checkpoint {folder}: not a whole checkpoint ({missing}); give a checkpoint-N folder, or "
            "True for the newest whole one in --output_dir"
        )
    return [folder]


def wants_to_resume(resume: str | bool | None) -> bool:
    """True for a folder and for a yes."""
    return resume is not None and str(resume).lower() not in _NO


def would_begin(candidates: Sequence[Path], here: Fingerprint, training: RetrieverTrainingArguments) -> Path | None:
    """The checkpoint that :func:`begin` would go on from, refused as there; nothing is changed."""
    folder, _ = _choose(candidates, here, training.resume_anyway)
    _others(folder, None if folder is None else read_record(folder), training)
    return folder


def begin(candidates: Sequence[Path], here: Fingerprint, training: RetrieverTrainingArguments) -> Start:
    """The run that starts or goes on now, and the checkpoint that it goes on from, the same for all processes.

    Raises ``UsageError``: no candidate is of this run, another run's checkpoints are in the way, or a process does not
    see the checkpoint. Nothing was changed.
    """
    run, folder = on_main(lambda: _begin(candidates, here, training))
    if folder is not None:
        blind = [rank for rank, sees in enumerate(gather_objects(not _missing(folder, training.sharded))) if not sees]
        on_main(lambda: _refuse_blind(folder, blind))
    if local_rank() == 0:
        remove_drafts(Path(str(training.output_dir)))
    return run, folder


def _begin(candidates: Sequence[Path], here: Fingerprint, training: RetrieverTrainingArguments) -> Start:
    folder, found = _choose(candidates, here, training.resume_anyway)
    record = None if folder is None else read_record(folder)
    run = Run(new_id() if record is None else str(record["run_id"]), here.record())
    others = _others(folder, record, training)
    if record is not None and folder is not None:
        run.changes = [*record["changes"]]
        if found.refused:
            run.changes.append({"step": step_of(folder), "changed": found.refused})
            logger.warning("--resume_anyway: another run from here on: %s", "; ".join(found.refused))
        if found.harmless:
            logger.info("going on with harmless differences: %s", "; ".join(found.harmless))
    elif folder is not None:
        logger.warning("%s is of a version that kept no fingerprint: going on without comparing the options", folder)
    if folder is not None and not any(folder.glob("rng_state*.pth")):
        logger.warning("%s holds no random states: dropout will not be that of the uninterrupted run", folder)
    logger.info("run %s: %s", run.id, "starts" if folder is None else f"goes on from {folder}")
    for other in others:
        remove_checkpoint(other)
    return run, folder


def _others(folder: Path | None, record: dict[str, Any] | None, training: RetrieverTrainingArguments) -> list[Path]:
    """Checkpoints of other runs in the output folder, which a run that goes on from ``folder`` removes, or refuses."""
    own = "" if record is None else str(record["run_id"])
    output_dir = Path(str(training.output_dir))
    others = foreign(output_dir, own if wants_to_resume(training.resume_from_checkpoint) else None)
    others = [other for other in others if folder is None or other.resolve() != folder.resolve()]
    refuse_foreign(output_dir, others, training.overwrite_output_dir)
    return others


def _choose(candidates: Sequence[Path], here: Fingerprint, anyway: bool) -> tuple[Path | None, Differences]:
    """The newest candidate that is of this run; with ``anyway`` the newest of all that can be gone on from."""
    refusals: list[tuple[Path, Differences]] = []
    for folder in candidates:
        record = read_record(folder)
        found = Differences() if record is None else compare(record["fingerprint"], here)
        if not found.fixed and (anyway or not found.decisive):
            for passed, _ in refusals:
                logger.warning("%s is of another run: passed over", passed)
            return folder, found
        refusals.append((folder, found))
    if not refusals:
        return None, Differences()
    folder, found = refusals[0]
    if found.fixed:
        advice = (
            f"its weights or its optimizer's state fit no such run; start a new one from its weights "
            f"(--model_name_or_path {folder}, another --output_dir, no --resume_from_checkpoint)"
        )
    else:
        advice = "give the options it was started with, or go on with the new ones by --resume_anyway True"
    raise UsageError(f"--resume_from_checkpoint: {folder} is of another run: {'; '.join(found.refused)}. {advice}")


def _refuse_blind(folder: Path, blind: list[int]) -> None:
    if blind:
        raise UsageError(
            f"{folder}: process(es) {', '.join(map(str, blind))} do not see this checkpoint; put --output_dir on a "
            "disk that all machines share, or copy it to each of them"
        )


def _missing(folder: Path, sharded: bool) -> str:
    """Why ``folder`` is no whole checkpoint; empty when it is."""
    if not folder.is_dir():
        return "no such folder"
    if not sharded:
        if not is_adapter(folder) and not (folder / "config.json").is_file():
            return "no config.json"
        for name in _NEEDED:
            if not (folder / name).is_file():
                return f"no {name}"
        if not any(folder.glob("*.safetensors")):
            return "no weights"
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {STATE_FILE}"
    return ""
