"""The HF Trainer with our batches, our objective's named terms, and exact continuation.

What is ours: batches come from a batch sampler keyed by (epoch, row); ``compute_loss`` keeps the objective's terms for
the log; a non-finite loss, or one of exactly 0 or ln N for ten steps, stops the run and names the rows; a checkpoint
also carries what stands between two log lines, so that a resumed run logs what the uninterrupted one would have.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import seed_worker

from FlagEmbedding.finetune.arguments import RetrieverTrainingArguments
from FlagEmbedding.finetune.biencoder import BiEncoder, EncoderOutput
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler
from FlagEmbedding.finetune.ema import WeightAverage
from FlagEmbedding.finetune.resume.fingerprint import Fingerprint
from FlagEmbedding.finetune.resume.interrupt import outlive_signals
from FlagEmbedding.finetune.resume.loss_window import LossWindow
from FlagEmbedding.finetune.resume.runs import STATE_FILE, Run, keep_newest, new_id, publish, writing
from FlagEmbedding.finetune.router_monitor import RouterMonitor, is_logged
from FlagEmbedding.finetune.trackers import tell
from FlagEmbedding.finetune.watch import LossWatch
from FlagEmbedding.modeling.backbone import load_trained_state
from FlagEmbedding.modeling.sharding import let_packed
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import gather_objects, rank, world_size
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

TRAINING_ARGS_FILE = "training_args.json"
SMALLEST_SLAB = 512  # tokens; below that a slab is not what fills the memory


def _start_worker(number: int, num_workers: int, rank: int) -> None:
    outlive_signals()
    seed_worker(number, num_workers=num_workers, rank=rank)


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
        fingerprint: what decides the run.

    Attributes:
        run: whose checkpoints are written.
        changed: the run goes on with another rate or optimizer setting than its checkpoint's (``--resume_anyway``).
    """

    def __init__(
        self,
        *,
        batch_sampler: TaskBatchSampler,
        train_arguments: dict[str, Any],
        fingerprint: Fingerprint,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_sampler, self.train_arguments = batch_sampler, train_arguments
        self.fingerprint, self.run, self.changed = fingerprint, Run(new_id(), fingerprint.record()), False
        self._tokens = 0  # of this process since they were last added up
        self._turn = (-1, -1)  # optimizer step, and which of its batches this process had last
        self._draft: Path | None = None  # where a checkpoint is being written
        self.window, self.router = LossWindow(), RouterMonitor()
        self.watch = LossWatch(self.window, self.args.gradient_accumulation_steps)
        self.average: WeightAverage | None = None
        decay = cast(RetrieverTrainingArguments, self.args).ema_decay
        if decay is not None:
            self.average = WeightAverage(self.bare_model, decay)
            self.add_callback(self.average)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; with a checkpoint folder, go on as if the run had never stopped."""
        self.add_callback(_LetPacked())
        if resume_from_checkpoint is not None:
            self.add_callback(_RestoreWindow(self, Path(resume_from_checkpoint)))
            if self.average is not None:
                self.average.load(Path(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._count_tokens()
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not one step beyond the last: the Trainer looks only after a step, so a run that had ended would go on."""
        if self.state.global_step >= self.state.max_steps:
            done, steps = self.state.global_step, self.state.max_steps
            logger.info("the checkpoint is of step %d, the run has %d: nothing is left to train", done, steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

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
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            worker_init_fn=partial(_start_worker, num_workers=workers, rank=self.args.process_index),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. Out of memory under gradient caching, it is computed again in slabs of half the size."""
        number = self._number_batch()
        while True:
            smaller = 0
            try:
                self._seed_batch(number)
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

    def _number_batch(self) -> int:
        """Which of its optimizer step's batches this process trains on now; batches are dealt out in turn."""
        step, turn = self._turn
        self._turn = step, turn = self.state.global_step, turn + 1 if step == self.state.global_step else 0
        return turn * world_size() + rank()

    def _seed_batch(self, number: int) -> None:
        """Under ``--global_batch_size`` a batch has the same dropout whichever process trains on it."""
        training = cast(RetrieverTrainingArguments, self.args)
        if training.deals_out_batches(self.bare_model.objective.negatives_cross_device):
            text = f"{self.args.seed}/{self.state.global_step}/{number}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)

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
        self._tokens += sum(sum(batch.lengths) for batch in inputs.values() if isinstance(batch, TokenBatch))
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
            self._count_tokens()
            logs |= self.window.flush(self.accelerator)
            if self.bare_model.has_experts:
                summary = self.router.summary(self.bare_model)
                details = {key: value for key, value in summary.items() if isinstance(value, list)}
                logs |= {key: value for key, value in summary.items() if key not in details}
        super().log(logs, start_time)
        self.state.log_history[-1].update(details)
        if details and self.args.report_to:
            tell(self.callback_handler.callbacks, details, self.args, self.state, self.control, model=self.bare_model)

    def _count_tokens(self) -> None:
        """Add what all processes have encoded to the state, which travels with checkpoints."""
        own, self._tokens = self._tokens, 0
        self.state.num_input_tokens_seen += sum(gather_objects(own))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        self.bare_model.save(folder, state_dict=state_dict)
        write_json_atomic(Path(folder) / TRAINING_ARGS_FILE, self.train_arguments)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._draft or super()._get_output_dir(trial))

    def push_to_hub(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Nothing: ``hub_upload`` uploads what was saved at the end."""

    init_hf_repo = _push_from_checkpoint = push_to_hub

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside the others and move it into place when all processes are through.

        Raises:
            UserError: it could not be written; nothing of it stays, and no other checkpoint has changed.
        """
        self.watch.settle()
        output_dir = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        totals = self.window.totals(self.accelerator)
        self._count_tokens()
        loss_sum = float(self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean"))
        self._draft = self.run.draft(output_dir)
        folder = self._draft / name
        try:
            with self._together(output_dir / name):
                if self.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    state = {"loss_sum": loss_sum, "last_logged": self._globalstep_last_logged}
                    state |= {"micro_batches": self._micro_batches()}
                    self.window.save(folder, totals, forwards=self.bare_model.step, **state)
                    self.router.save(folder)
                    if self.average is not None:
                        self.average.save(folder)
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(folder):  # the Trainer names the draft
                    self.state.best_model_checkpoint = str(output_dir / name)
                    if self.args.should_save:
                        self.state.save_to_json(str(folder / STATE_FILE))
            with self._together(output_dir / name):
                if self.args.should_save:
                    self.run.describe(folder)
                    publish(folder, output_dir / name)
            with self._together(output_dir / name):
                if self.args.local_process_index == 0 and folder.exists():  # on a disk of this machine's own
                    publish(folder, output_dir / name)
        finally:
            self._draft = None
        if self.args.should_save:
            keep_newest(output_dir, self.run.id, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _together(self, folder: Path) -> Iterator[None]:
        """A part of saving that succeeds for all processes or fails for all; all leave it together."""
        problem: UserError | None = None
        try:
            with writing(folder, Path(str(self.args.output_dir))):
                yield
        except UserError as error:
            problem = error
        if first := next(filter(None, gather_objects(problem and str(problem))), None):
            assert self._draft is not None
            shutil.rmtree(self._draft, ignore_errors=True)
            if self.args.process_index > 0:
                sys.exit(2)  # the first one says why
            raise UserError(first) from problem

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also of a run that goes on with other settings, which would otherwise be put back to the checkpoint's."""
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.changed:
            return
        for group, values in zip(self._groups(), settings, strict=True):
            group.update(values)
        if isinstance(scheduler := self.lr_scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in self._groups()]
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * share(scheduler.last_epoch) for base, share in pairs]
            for group, rate in zip(self._groups(), scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups if self.changed and self.optimizer is not None else []

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained_state(self.bare_model, Path(resume_from_checkpoint))

    def _micro_batches(self) -> int:
        """In a step of the whole run."""
        return self.args.gradient_accumulation_steps * world_size()

    def restore_window(self, folder: Path) -> None:
        """Put back what stood between the last log line and the checkpoint (called when training begins)."""
        state = self.window.load(folder, self.args.device, main=self.args.process_index == 0)
        if state is None:
            logger.warning("%s holds no log window: the first logged loss covers the steps since it", folder)
            return
        self.window.weigh(self._micro_batches() / state.get("micro_batches", self._micro_batches()))
        self.bare_model.step = state["forwards"]
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["last_logged"]
        self.router.load(folder, self.args.device)
