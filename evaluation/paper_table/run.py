"""Run a cell's commands one after the other, and remember what is done.

A stage's record is written when its command has ended well, so a killed run starts again at the stage it was in (and
step 0 goes on inside it). What a stage read has changed: it is run again, and everything after it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from FlagEmbedding.finetune.resume.runs import checkpoints, remove_checkpoint
from FlagEmbedding.retrieval.index import remove_index
from FlagEmbedding.utils.commands import run_command
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from paper_table.plan import STAGES, Cell, Options

logger = get_logger(f"FlagEmbedding.{__name__}")


def run_cell(
    options: Options, cell: Cell, keys: dict[str, str], place: str, qrels: Path | None, keep_index: bool
) -> dict[str, Any]:
    """Run the stages of ``cell`` that are not done; its record: stage -> key, command, seconds, memory.

    ``place`` says for the log where the cell stands among all (``3/11``). Raises ``DataError`` with the last words of
    a command that failed.
    """
    path = options.output_dir / "records" / f"{cell.id}.json"
    record = _read(path)
    for stage in keys:
        if _done(options, cell, record, keys, stage):
            continue
        _clear(options, cell, stage, record.get(stage, {}).get("begun") == keys[stage])
        record[stage] = {"begun": keys[stage]}
        write_json_atomic(path, record)
        logger.info("[%s] %s: %s", place, cell, stage)
        log = options.output_dir / "logs" / f"{cell.id}.{stage}.log"
        found = run_command(options.command(cell, stage, qrels), log, f"{cell}: {stage}")
        record[stage] = {"key": keys[stage], **found}
        write_json_atomic(path, record)
        if stage == "search" and not keep_index:
            remove_index(options.product(cell, "index").parent)
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable record ({error}); delete it to run this cell again") from error


def _done(options: Options, cell: Cell, record: dict[str, Any], keys: dict[str, str], stage: str) -> bool:
    if record.get(stage, {}).get("key") != keys[stage]:
        return False
    # The index is thrown away once it was searched, and a model may be once it was scored.
    of_use = [stage] if stage == "search" else STAGES[STAGES.index(stage) :]
    return any(record.get(s, {}).get("key") == keys[s] and options.product(cell, s).exists() for s in of_use)


def _clear(options: Options, cell: Cell, stage: str, same: bool) -> None:
    """Remove what an earlier run left: step 0 sees to its own index, and checkpoints of the ``same`` inputs go on."""
    if stage == "train" and not same:
        for checkpoint in checkpoints(Path(options.encoder(cell))):
            remove_checkpoint(checkpoint)
            with suppress(OSError):  # gone, or files that no run has written are in it
                checkpoint.rmdir()
    if stage != "index":
        options.product(cell, stage).unlink(missing_ok=True)
