"""Training with dev queries: measures by the engine of steps 0 to 2, the best checkpoint kept, early stopping.

Imported only where an evaluation is on. Step 0 is the untouched base. An evaluation works on a copy of the weights and
leaves every random stream as it was, so losses are those of a run without it.

What Hugging Face's Trainer lacks for this: its ``evaluate`` wants a dataset and a loss, its best checkpoint is the best
of those that happened to be saved, its loading of one knows single files of weights, and neither the base nor a resumed
patience counts.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from FlagEmbedding.finetune.dev.evaluation import DevEvaluation
from FlagEmbedding.finetune.ema import load_kept
from FlagEmbedding.finetune.resume.runs import STATE_FILE, publish, remove_checkpoint
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.utils.distributed import barrier, is_main
from FlagEmbedding.utils.io import read_json
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


class DevTrainer(BiEncoderTrainer):
    """``BiEncoderTrainer`` that evaluates on ``dev``.

    Args:
        dev: the dev queries, what is measured on them, and where the figures of single queries are kept.
    """

    def __init__(self, *, dev: DevEvaluation, **kwargs: Any) -> None:
        super().__init__(eval_dataset=[], **kwargs)  # not read, but wanted where there is an evaluation
        self.dev = dev
        self.add_callback(_EvaluateBase(self))
        if dev.options.early_stopping_patience:
            self.add_callback(Patience(dev.options.early_stopping_patience))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; the base is measured first, and kept where it may turn out best."""
        self.dev.prepare(self.bare_model, fresh=resume_from_checkpoint is None)
        if self.args.load_best_model_at_end:
            if is_main():
                self._keep_base()
            barrier()
        if resume_from_checkpoint is not None and self._patience_is_used_up(Path(resume_from_checkpoint)):
            self._finished(resume_from_checkpoint)
            result = None
        else:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._say_best()
        best = self.state.best_model_checkpoint
        barrier()
        if is_main() and (best is None or Path(best) != self.dev.base_folder):
            remove_checkpoint(self.dev.base_folder)
        return result

    def _keep_base(self) -> None:
        """Save the untouched base as a checkpoint of this run."""
        draft = self.run.draft(Path(str(self.args.output_dir))) / self.dev.base_folder.name
        self.bare_model.save(str(draft))
        self.run.describe(draft)
        publish(draft, self.dev.base_folder)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the model as it is (with ``--ema_decay`` its averaged weights), and log the figures."""
        with nullcontext() if self.average is None else self.average.applied():
            metrics = self.dev.measure(self.bare_model, self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        new = bool(super()._determine_best_metric(metrics, trial))
        if new:
            self.state.best_global_step = self.state.global_step
            if self.args.load_best_model_at_end:
                self.control.should_save = True  # whatever the interval: the best must be there at the end
        return new

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.state.best_global_step == self.state.global_step:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self.state.best_model_checkpoint = str(folder)
        super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_kept(self.bare_model, Path(self.state.best_model_checkpoint))

    def measure_base(self) -> None:
        """Step 0 of the log."""
        metrics = self.evaluate()
        if self._determine_best_metric(metrics, None) and self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = str(self.dev.base_folder)
        self.control.should_save = False

    def _say_best(self) -> None:
        step, value = self.state.best_global_step, self.state.best_metric
        if step is None or value is None:
            return
        loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        what = "the base itself: no evaluation was above it" if step == 0 else f"step {step}"
        kept = "its weights are what is kept" if loaded else "what is kept is the last step (--load_best_model_at_end)"
        logger.info("best %s: %.1f, of %s; %s", self.args.metric_for_best_model, 100 * value, what, kept)

    def _patience_is_used_up(self, folder: Path) -> bool:
        patience = self.dev.options.early_stopping_patience
        if not patience:
            return False
        stored = read_json(folder / STATE_FILE).get("stateful_callbacks", {}).get(Patience.__name__, {})
        return bool(stored.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience)

    def _finished(self, folder: str) -> None:
        """A run that had stopped by itself is not trained further; its outcome is what it was."""
        logger.info("%s: the run had used up its --early_stopping_patience; nothing is left to train", folder)
        self.state = TrainerState.load_from_json(str(Path(folder) / STATE_FILE))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_kept(self.bare_model, Path(best or folder))


class _EvaluateBase(TrainerCallback):
    """Before the first step; a resumed run has it in its log."""

    def __init__(self, trainer: DevTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.measure_base()


class Patience(EarlyStoppingCallback):
    """Hugging Face's early stopping, whose count goes on in a resumed run, and which says why it stops."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept: Any = state.stateful_callbacks  # a dictionary by name, whatever its annotation says
        stored = kept.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = stored.get("early_stopping_patience_counter", 0)
        kept[type(self).__name__] = self.state()

    def on_evaluate(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "step %d: no new best in %d evaluations, stopping", state.global_step, self.early_stopping_patience
            )
