"""The HF Trainer with our batches, our objective's named terms, and exact continuation.

What is ours: batches come from a batch sampler keyed by (epoch, row); ``compute_loss`` keeps the objective's terms for
the log; a non-finite loss, or one of exactly 0 or ln N for ten steps, stops the run and names the rows; a checkpoint
also carries what stands between two log lines, so that a resumed run logs what the uninterrupted one would have.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import seed_worker

from FlagEmbedding.finetune.biencoder import BiEncoder, EncoderOutput
from FlagEmbedding.finetune.checkpoints import STATE_FILE, LossWindow
from FlagEmbedding.finetune.router_monitor import RouterMonitor, is_logged
from FlagEmbedding.finetune.sampler import TaskBatchSampler
from FlagEmbedding.finetune.watch import LossWatch
from FlagEmbedding.modeling.backbone import load_trained_state
from FlagEmbedding.modeling.sharding import let_packed
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

TRAINING_ARGS_FILE = "training_args.json"
SMALLEST_SLAB = 512  # tokens; below that a slab is not what fills the memory


class _RestoreWindow(TrainerCallback):
    """The Trainer resets its running loss just before it tells callbacks that training begins: restore it then."""

    def __init__(self, trainer: BiEncoderTrainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.restore_window(self.folder)


class _LetPacked(TrainerCallback):
    """By the time that training begins, accelerate has sharded the model."""

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if isinstance(model, BiEncoder) and isinstance(model, FSDPModule):
            let_packed(model)


class BiEncoderTrainer(Trainer):
    """Trains a ``BiEncoder`` on batches of a ``TaskBatchSampler``.

    Args:
        batch_sampler: yields lists of (epoch, row) keys for the train dataset.
        train_arguments: what the command line said, written beside every checkpoint as JSON.
    """

    def __init__(self, *, batch_sampler: TaskBatchSampler, train_arguments: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_sampler, self.train_arguments = batch_sampler, train_arguments
        self.window, self.router = LossWindow(), RouterMonitor()
        self.watch = LossWatch(self.window, self.args.gradient_accumulation_steps)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; with a checkpoint folder, go on as if the run had never stopped."""
        self.add_callback(_LetPacked())
        if resume_from_checkpoint is not None:
            self.add_callback(_RestoreWindow(self, Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of our sampler; accelerate gives every process its share of them."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. Out of memory under gradient caching, it is computed again in slabs of half the size."""
        while True:
            smaller = 0
            try:
                return super().training_step(model, dict(inputs), *args, **kwargs)
            except torch.OutOfMemoryError as error:
                smaller = self._smaller_slab()
                if not smaller:
                    raise UserError(
                        f"out of memory at step {self.state.global_step + 1}: lower --per_device_train_batch_size, or "
                        "add --grad_cache True and a smaller --slab_tokens"
                    ) from error
            # Outside of the except block, which would hold on to the failed step's tensors.
            model.zero_grad(set_to_none=True)
            self.bare_model.engine = replace(self.bare_model.engine, slab_tokens=smaller)
            torch.cuda.empty_cache()
            logger.warning(
                "out of memory at step %d: going on in slabs of %d tokens", self.state.global_step + 1, smaller
            )

    def _smaller_slab(self) -> int:
        """Half the slab, where the micro-batch may be computed again: alone, no gradients before it; else 0."""
        engine = self.bare_model.engine
        alone = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        tokens = engine.slab_tokens or 0
        return tokens // 2 if engine.grad_cache and alone and tokens > SMALLEST_SLAB else 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """The model's objective; its terms go to the log, its rows into the message when it breaks."""
        rows = inputs.pop("rows", [])
        if self.bare_model.has_experts:
            self.router.start_probe(self.bare_model, inputs["passage"])
            self.bare_model.all_terms = is_logged(self.args, self.state)
        output: EncoderOutput = model(**inputs)
        assert output.loss is not None and output.terms is not None
        assert output.scores is not None
        self.watch.look(output.loss.detach(), output.scores.detach(), rows, self.state.global_step + 1)
        self.window.add(output.terms)
        if output.routing:
            self.router.observe(output.routing)
        return (output.loss, output) if return_outputs else output.loss

    @property
    def bare_model(self) -> BiEncoder:
        """The model without the wrappers of distributed training."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, BiEncoder)
        return model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms and router scalars to a loss line; per-layer lists go to trainer_state.json alone."""
        self.watch.settle()
        details: dict[str, Any] = {}
        if "loss" in logs:
            logs |= self.window.flush(self.accelerator)
            if self.bare_model.has_experts:
                summary = self.router.summary(self.bare_model)
                details = {key: value for key, value in summary.items() if isinstance(value, list)}
                logs |= {key: value for key, value in summary.items() if key not in details}
        super().log(logs, start_time)
        self.state.log_history[-1].update(details)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        self.bare_model.save(folder, state_dict=state_dict)
        write_json_atomic(Path(folder) / TRAINING_ARGS_FILE, self.train_arguments)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.watch.settle()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        totals = self.window.totals(self.accelerator)
        loss_sum = float(self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean"))
        if self.args.should_save:
            # The state file, written last, marks a whole checkpoint; a killed run may have left an old one here.
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_FILE).unlink(missing_ok=True)
            state = {"loss_sum": loss_sum, "last_logged": self._globalstep_last_logged}
            self.window.save(folder, totals, forwards=self.bare_model.step, **state)
            self.router.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained_state(self.bare_model, Path(resume_from_checkpoint))

    def restore_window(self, folder: Path) -> None:
        """Put back what stood between the last log line and the checkpoint (called when training begins)."""
        state = self.window.load(folder, self.args.device, main=self.args.process_index == 0)
        if state is None:
            logger.warning("%s holds no log window: the first logged loss covers the steps since it", folder)
            return
        self.bare_model.step = state["forwards"]
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["last_logged"]
        self.router.load(folder, self.args.device)
