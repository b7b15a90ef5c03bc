"""What a run is about to do, in one short block at its start: model, rows, batches, steps, and every changed flag."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from FlagEmbedding.finetune.arguments import Arguments, RetrieverTrainingArguments
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.utils.provenance import STRUCK

# Named in a line of their own, or set by the machine.
_NOT_LISTED = {
    "model_name_or_path", "train_data", "output_dir", "use_cpu", "dataloader_pin_memory", "accelerator_config",
    "gradient_checkpointing", "warmup_ratio", "do_train", "plan",
}  # fmt: skip
_NOTHING: tuple[Any, ...] = (None, False, "", "no", "none", [], {})


def block(title: str, lines: dict[str, str]) -> str:
    """One line each, below a title."""
    width = max(map(len, lines))
    return f"{title}:" + "".join(f"\n  {name:{width}}  {text}" for name, text in lines.items())


def planned_steps(trainer: BiEncoderTrainer, training: RetrieverTrainingArguments) -> tuple[int, int]:
    """Optimizer steps of the whole run, and of one epoch."""
    per_step = training.world_size * training.gradient_accumulation_steps
    per_epoch = max(1, math.ceil(len(trainer.batch_sampler) / per_step))
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    return steps, per_epoch


def settings_lines(trainer: BiEncoderTrainer, arguments: Arguments) -> dict[str, str]:
    """What the block says of what was built from ``arguments``, by the names of its lines."""
    model, training = trainer.bare_model, arguments.training
    dataset = trainer.batch_sampler.dataset
    data = dataset.options  # with lengths cut to the model's positions
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = sum(len(task.rows) for task in dataset.tasks)
    batch, world, times = (
        training.per_device_train_batch_size,
        training.world_size,
        training.gradient_accumulation_steps,
    )
    steps, per_epoch = planned_steps(trainer, training)
    vectors = f"{model.pooling}, {'' if model.normalize else 'not '}normalized, {training.dtype_name}"
    schedule = f"{_name(training.lr_scheduler_type)}, {training.get_warmup_steps(steps):,} of warmup"
    passages = f"{data.passage_max_len} of each of {data.train_group_size} passages"
    return {
        "model": f"{arguments.model.model_name_or_path} ({vectors})",
        "trained": f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters",
        "rows": f"{rows:,} of {', '.join(data.train_data)}, as {len(dataset.tasks)} task(s)",
        "tokens": f"up to {data.query_max_len} of a query, {passages}",
        "step": f"{batch * world * times:,} queries: {batch} at a time x {world} process(es) x {times} accumulated",
        "steps": f"{steps:,}, {per_epoch:,} per epoch; rate {training.learning_rate:g}, {schedule}",
        "output": f"{training.output_dir}, checkpoints {_when(training)}",
        "changed": " ".join(changed(arguments)) or "nothing",
    }


def _when(training: Any) -> str:
    strategy = _name(training.save_strategy)
    every = f"every {training.save_steps:g} steps" if strategy == "steps" else f"every {strategy}"
    return "at the end alone" if strategy == "no" else every


def changed(arguments: Arguments) -> Iterator[str]:
    """Every flag that does not say its default, as it would be written."""
    for group in vars(arguments).values():
        for each in fields(group):
            value = _plain(getattr(group, each.name))
            default = each.default if each.default_factory is MISSING else each.default_factory()
            same = value == _plain(default) or (
                group is arguments.training and value in _NOTHING and default in _NOTHING
            )
            if each.init and each.name not in _NOT_LISTED and not same:
                yield f"--{each.name} {STRUCK if each.name.endswith('token') else _words(value)}"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else _name(value)


def _name(value: Any) -> Any:
    return getattr(value, "value", value)


def _words(value: Any) -> str:
    return (
        " ".join(map(_words, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else f"{value}"
    )
