"""Negatives mined again with the current weights every N epochs (``--refresh_negatives_every_n_epochs``).

At the first step of epochs N, 2N, … every training file is mined again by the weights as they are into
``output_dir/refresh/epoch-E``, and the dataset draws from these files from then on; row numbers stay. A resumed run
finds the files of its epoch there, known by the digest in trainer_state.json, and equals the uninterrupted one: mining
takes no random number from training. All processes embed the corpus; the main one then searches while the others wait
(``--ddp_timeout`` bounds how long).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.mining.hard_negatives.refresh import RefreshSettings, check_passages, read_refresh, refresh_negatives
from FlagEmbedding.utils.distributed import barrier, is_main
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.randomness import untouched_randomness

logger = get_logger(__name__)

FOLDER = "refresh"
DIGEST = "refresh_sha256"


class RefreshNegatives(TrainerCallback):
    """Exchanges ``dataset``'s negatives, mined by ``trainer``'s model, at the start of every ``every``-th epoch."""

    def __init__(self, trainer: BiEncoderTrainer, dataset: TrainDataset, arguments: Arguments) -> None:
        self.trainer, self.dataset, training = trainer, dataset, arguments.training
        self.every = arguments.refresh.refresh_negatives_every_n_epochs
        self.settings = RefreshSettings(
            arguments.refresh, arguments.data, arguments.model, training.sampling_seed, training.dtype_name
        )
        self.folder = Path(str(training.output_dir)) / FOLDER
        self.originals = [Path(stored.file.path) for stored in dataset.files]
        self.drawn_from = 0  # the epoch whose refresh the dataset draws from; 0: the user's own files

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Let a faulty corpus stop the run now."""
        if is_main():
            check_passages(self.originals, self.folder, self.settings)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mine, or find what was mined, when this epoch needs other files than the last."""
        # Optimizer steps of an epoch, as the Trainer counts them: a remainder of the accumulation is a step too.
        steps = max(1, -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps))
        epoch, inside = divmod(state.global_step, steps)
        due = epoch // self.every * self.every
        if due == self.drawn_from:
            return
        folder = self.folder / f"epoch-{due}"
        if epoch == due and inside == 0:
            record = self._mine(folder)
            figures = {f"refresh_{name}": value for name, value in record["figures"].items()}
            self.trainer.log({"refresh_epoch": float(due), **figures})
            # Text is for trainer_state.json alone: the reporters want numbers.
            state.log_history[-1].update({DIGEST: digest_of(record)})  # type: ignore[dict-item]
        else:
            record = self._find(folder, state, due)
        self.dataset.replace_files([folder / name for name in record["files"]])
        self.drawn_from = due

    def _mine(self, folder: Path) -> dict[str, Any]:
        # Where checkpoints are written, too: nobody else's files are there, and what a kill leaves goes.
        checkpoint = self.trainer.run.draft(self.folder.parent) / "weights"
        logger.info("%s: mining negatives again with the current weights", folder)
        with untouched_randomness():
            if is_main():
                self.trainer.bare_model.save(str(checkpoint))
            barrier()
            record = refresh_negatives(checkpoint, self.originals, folder, self.settings)
            barrier()
        if is_main():
            shutil.rmtree(checkpoint.parent)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return record

    def _find(self, folder: Path, state: TrainerState, due: int) -> dict[str, Any]:
        """The files that the resumed epoch was drawn from."""
        record = read_refresh(folder)
        known = [line[DIGEST] for line in state.log_history if line.get("refresh_epoch") == due and DIGEST in line]
        if record is None or (known and str(known[-1]) != digest_of(record)):
            what = "is missing or damaged" if record is None else "belongs to another run"
            raise UsageError(
                f"{folder}: the negatives that epoch {due} was trained on: {what}, so the run cannot go on as it was; "
                f"resume from a checkpoint of before epoch {due}, or start without --resume_from_checkpoint"
            )
        return record


def digest_of(record: dict[str, Any]) -> str:
    """One SHA-256 for all files of a refresh."""
    return hashlib.sha256(json.dumps(record["sha256"]).encode()).hexdigest()
