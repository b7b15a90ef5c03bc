"""Negatives mined again with the current weights every N epochs (``--refresh_negatives_every_n_epochs``).

At the first step of epochs N, 2N, … the weights go to ``output_dir/refresh/epoch-E/checkpoint``, every training file is
mined again by them (``mining/refresh.py``) into ``output_dir/refresh/epoch-E``, and the dataset draws from these files
from then on. Row numbers stay, so batches are keyed as before.

A resumed run finds the files of its epoch there; trainer_state.json names their digest, so that files of another run
are not taken for them. What is mined depends on the weights, the rows and the seed alone and takes no random number
from training: a resumed run equals the uninterrupted one.

All processes embed the corpus; the main one then searches while the others wait (``--ddp_timeout`` bounds how long).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.dataset import TrainDataset
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.mining.hard_negatives.refresh import RefreshSettings, check_passages, read_refresh, refresh_negatives
from FlagEmbedding.utils.distributed import barrier, is_main
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

FOLDER = "refresh"
DIGEST = "refresh_sha256"


class RefreshNegatives(TrainerCallback):
    """Exchanges the dataset's negatives at the start of every ``every``-th epoch.

    Args:
        trainer: whose model mines.
        dataset: whose rows are exchanged.
        arguments: of the run; negatives are mined by the model as it trains.
    """

    def __init__(self, trainer: BiEncoderTrainer, dataset: TrainDataset, arguments: Arguments) -> None:
        self.trainer, self.dataset = trainer, dataset
        self.every = arguments.refresh.refresh_negatives_every_n_epochs
        self.settings = refresh_settings(arguments)
        self.originals = [Path(stored.file.path) for stored in dataset.files]
        self.drawn_from = 0  # the epoch whose refresh the dataset draws from; 0: the user's own files

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a faulty corpus stop the run now."""
        if is_main():
            check_passages(self.originals, Path(str(args.output_dir)) / FOLDER, self.settings)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mine, or find what was mined, when this epoch needs other files than the last."""
        epoch, inside = divmod(
            state.global_step, steps_an_epoch(kwargs["train_dataloader"], args.gradient_accumulation_steps)
        )
        due = epoch // self.every * self.every
        if due == self.drawn_from:
            return
        folder = Path(str(args.output_dir)) / FOLDER / f"epoch-{due}"
        if epoch == due and inside == 0:
            record = self._mine(folder)
            self._log(state, due, record)
        else:
            record = self._find(folder, state, due)
        self.dataset.replace_files([folder / name for name in record["files"]])
        self.drawn_from = due

    def _mine(self, folder: Path) -> dict[str, Any]:
        checkpoint = folder / "checkpoint"
        logger.info("%s: mining negatives again with the current weights", folder)
        with untouched_randomness():
            if is_main():
                self.trainer.bare_model.save(str(checkpoint))
            barrier()
            record = refresh_negatives(checkpoint, self.originals, folder, self.settings)
            barrier()
        if is_main():
            shutil.rmtree(checkpoint)
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

    def _log(self, state: TrainerState, due: int, record: dict[str, Any]) -> None:
        figures = {f"refresh_{name}": value for name, value in record["figures"].items()}
        self.trainer.log({"refresh_epoch": float(due), **figures})
        # Text is for trainer_state.json alone: the reporters want numbers.
        line: dict[str, Any] = state.log_history[-1]
        line[DIGEST] = digest_of(record)


def refresh_settings(arguments: Arguments) -> RefreshSettings:
    """A run's options in mining's words."""
    data, refresh = arguments.data, arguments.refresh
    return RefreshSettings(
        corpus=tuple(refresh.refresh_corpus),
        range_for_sampling=refresh.refresh_range_for_sampling,
        relative_margin=refresh.refresh_relative_margin,
        seed=arguments.training.sampling_seed,
        query_length=data.query_max_len,
        passage_length=data.passage_max_len,
        query_instruction=data.query_instruction_for_retrieval,
        passage_instruction=data.passage_instruction_for_retrieval,
        pooling=arguments.model.sentence_pooling_method or "cls",
        normalize=arguments.model.normalize_embeddings is not False,
        dtype=arguments.training.dtype_name,
    )


def digest_of(record: dict[str, Any]) -> str:
    """One SHA-256 for all files of a refresh."""
    return hashlib.sha256(json.dumps(record["sha256"]).encode()).hexdigest()


def steps_an_epoch(loader: DataLoader[Any], accumulation: int) -> int:
    """Optimizer steps of an epoch, as the Trainer counts them: a remainder of the accumulation is a step too."""
    return max(1, -(-len(loader) // accumulation))


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave every random stream that training draws from as it was."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
