"""Which flags of Hugging Face's ``TrainingArguments`` this command does not serve: each is refused with its reason.

What needs no more than the values is asked where the arguments are made (:func:`refuse_unserved`); optimizers and
schedules, whose packages and options only they know themselves, are tried on a small weight (:func:`try_out`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from FlagEmbedding.utils.distributed import local_rank, world_size
from FlagEmbedding.utils.errors import UsageError

# What a flag is refused for when it says anything but its default.
_EVALUATION = "dev queries are measured as steps 0 to 2 do it: --eval_data_dir or --eval_rows, and --eval_steps"
_DRAWING = "batches are drawn and divided among the processes by this program, repeatably"
_DENSE = "there is no such code for encoders"
_LOSS = "the objective is a contrastive loss, without labels"
_WITHOUT_PUSH = "has no effect without --push_to_hub True"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches",
            "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
            "bf16_full_eval", "fp16_full_eval", "label_names",
        ),
        _EVALUATION,
    ),
    "label_smoothing_factor": _LOSS,
    "average_tokens_across_devices": f"{_LOSS} or tokens to count: every process's rows weigh the same",
    "neftune_noise_alpha": "the noise would have to go through the packed engine, which has none",
    "torch_compile": "every step's lengths would be compiled again; --engine packed is the fast way",
    "torch_compile_backend": "it belongs to --torch_compile, which is not served",
    "torch_compile_mode": "it belongs to --torch_compile, which is not served",
    "use_liger_kernel": _DENSE,
    "liger_kernel_config": _DENSE,
    "use_cache": "encoders keep no keys and values",
    "include_num_input_tokens_seen": "several sequences make a row, which the Trainer cannot count",
    "accelerator_config": _DRAWING,
    "parallelism_config": "models are divided by --fsdp or --deepspeed",
    "train_sampling_strategy": f"{_DRAWING} (--same_task_within_batch and --batch_size_by_length choose)",
    "length_column_name": _DRAWING,
    "dataloader_in_order": f"{_DRAWING}, in this order",
    "remove_unused_columns": "the collator needs every key",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "ignore_data_skip": "a continued run goes on with the row where it stopped",
    "restore_callback_states_from_checkpoint": "what callbacks keep is restored from the checkpoint's own files",
    "auto_find_batch_size": (
        "it would change the batch, and with it the loss, in mid-run; --grad_cache True bounds memory at any batch size"
    ),
}  # fmt: skip
_HUB = ("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision")
_INSTALL = {
    "azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit", "neptune": "neptune", "mlflow": "mlflow",
}  # fmt: skip
_UNLISTED = {"flyte": "flytekit", "azure_ml": "azureml"}  # that transformers does not list where they are
_FILES = ("fsdp_config", "deepspeed")  # dictionaries that may also stand in a file


def refuse_unserved(given: TrainingArguments) -> None:
    """Raise ``UsageError`` for the first flag that says what this command cannot do.

    Args:
        given: as parsed, before Hugging Face fills in what follows from other values.
    """
    for complaint in (*_refused(given), *_combined(given), *_malformed(given)):
        raise UsageError(complaint)


def refuse_reporters(reporters: list[str]) -> None:
    """Raise ``UsageError`` for a tracker that nobody knows, or whose package is missing."""
    if not reporters:
        return
    # Imported here: it takes seconds, and the default is no reporter.
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in sorted(set(reporters) - set(INTEGRATION_TO_CALLBACK)):
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise UsageError(f"--report_to {name}: expected none, all or one of {known}")
    there = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in reporters:
        package = _INSTALL.get(name, name)
        module = _UNLISTED.get(name)
        if find_spec(module) is None if module else name not in there:
            raise UsageError(
                f"--report_to {name}: its package is not installed, or switched off by the environment: pip install "
                f"{package}"
            )


def try_out(training: TrainingArguments) -> None:
    """Make the optimizer and its schedule over one small weight: what they refuse is said before a model is loaded.

    Raises:
        UsageError: a package is missing, or an option is one that they do not take.
    """
    from transformers import Trainer, get_scheduler

    optim, schedule = f"--optim {_text(training.optim)}", f"--lr_scheduler_type {_text(training.lr_scheduler_type)}"
    weight = nn.Linear(2, 2)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, weight)  # type: ignore[arg-type]
        parameters = options.pop("params", None) or options.pop("optimizer_dict", None) or weight.parameters()
        optimizer = kind(parameters, **options) if isinstance(kind, type) and not isinstance(parameters, dict) else None
    except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        # Each optimizer's package says in its own kind of error what it does not take.
        if training.optim_target_modules and "No target modules" in str(error):
            return  # they are modules of the real model
        raise UsageError(f"{optim}: {_line(error)}") from error
    if optimizer is None:
        return
    try:
        get_scheduler(
            training.lr_scheduler_type, optimizer, num_warmup_steps=training.get_warmup_steps(100),
            num_training_steps=100, scheduler_specific_kwargs=training.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(f"{schedule}: {_line(error)}; see --lr_scheduler_kwargs") from error


def _refused(given: TrainingArguments) -> Iterator[str]:
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(given)}
    for name, reason in REFUSED.items():
        value = getattr(given, name, None)
        # The parser makes "no" of some flags False; a copy of arguments carries what accelerate made of its flag.
        if name not in defaults or (defaults[name] == "no" and value is False):
            continue
        if value != defaults[name] and not isinstance(value, AcceleratorConfig):
            yield f"--{name} {_text(value)}: {reason}"
    if not given.push_to_hub:
        for name in _HUB:
            if getattr(given, name) != defaults[name]:
                yield f"--{name} {_WITHOUT_PUSH}"


def _combined(given: TrainingArguments) -> Iterator[str]:
    if given.deepspeed and find_spec("deepspeed") is None:
        yield "--deepspeed: its package is not installed: pip install deepspeed"
    if given.fsdp_config and not given.fsdp:
        yield "--fsdp_config has no effect without --fsdp"
    checkpointing = ("activation_checkpointing", "gradient_checkpointing")
    for name in checkpointing:
        if getattr(given, f"{name}_kwargs", None) and not any(getattr(given, each, None) for each in checkpointing):
            yield f"--{name}_kwargs has no effect without --{name} True"
    if given.optim_target_modules and not _text(given.optim).startswith(("galore", "apollo")):
        yield "--optim_target_modules belongs to the galore and apollo optimizers: see --optim"
    if given.optim_args and _text(given.optim).startswith("adamw_torch") and "bit" not in _text(given.optim):
        yield f"--optim_args has no effect with --optim {_text(given.optim)}: it has --adam_beta1 and so on"
    if given.ddp_backend and world_size() == 1:
        yield f"--ddp_backend {given.ddp_backend} has no effect in a single process: start several with torchrun"
    if given.local_rank not in (-1, local_rank()):
        yield f"--local_rank {given.local_rank}: the environment's LOCAL_RANK decides; start several with torchrun"


def _malformed(given: TrainingArguments) -> Iterator[str]:
    for name in given._VALID_DICT_FIELDS:
        value = getattr(given, name, None)
        if not isinstance(value, str):
            continue
        if not value.startswith("{") and name in _FILES and Path(value).is_file():
            value = Path(value).read_text(encoding="utf-8", errors="replace")
        example = "a JSON mapping such as '{\"name\": 1}'" + (" or the path of one" if name in _FILES else "")
        try:
            right = isinstance(json.loads(value), dict)
        except ValueError:
            right = False
        if not right:
            yield f"--{name}: expected {example}, got {getattr(given, name)!r}"


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
