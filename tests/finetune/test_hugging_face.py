"""Every flag of the installed TrainingArguments acts, or is refused in one line before anything is loaded."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from finetune.helpers import REPOSITORY, TORCHRUN, environment, rows, train_words, write_rows
from options_walk import Case, assert_acts, assert_complete
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from FlagEmbedding.finetune.checks import check_arguments
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.runner import build_trainer
from FlagEmbedding.utils.errors import UsageError

BASE = "--model_name_or_path /nowhere/model --train_data /nowhere/rows --output_dir /nowhere/out"
SAVED = "--save_strategy steps --save_steps 1"
PUSH = "has no effect without --push_to_hub True"
NO_EVALUATION = "dev queries are measured as steps 0 to 2 do it"
NEEDS = "needs an evaluation: name the dev queries"

# name → what is said, and what the refusal says
REFUSED = {
    **{name: (f"--{name} True", NO_EVALUATION) for name in (
        "do_eval", "do_predict", "prediction_loss_only", "eval_use_gather_object", "batch_eval_metrics",
        "bf16_full_eval", "fp16_full_eval",
    )},
    **{name: (f"--{name} 3", NO_EVALUATION) for name in ("per_device_eval_batch_size", "eval_accumulation_steps")},
    # test_checks.py has what evaluation while training does with these.
    **{name: (f"--{name} True", NEEDS) for name in ("eval_on_start", "greater_is_better", "load_best_model_at_end")},
    **{name: (f"--{name} 3", NEEDS) for name in ("eval_steps", "eval_delay")},
    "eval_strategy": ("--eval_strategy epoch", NEEDS),
    "eval_do_concat_batches": ("--eval_do_concat_batches False", NO_EVALUATION),
    "include_for_metrics": ("--include_for_metrics inputs", NO_EVALUATION),
    "metric_for_best_model": ("--metric_for_best_model loss", NEEDS),
    "label_names": ("--label_names x", NO_EVALUATION),
    "label_smoothing_factor": ("--label_smoothing_factor 0.1", "contrastive loss, without labels"),
    "average_tokens_across_devices": ("--average_tokens_across_devices False", "weigh the same"),
    "neftune_noise_alpha": ("--neftune_noise_alpha 5", "packed engine"),
    "torch_compile": ("--torch_compile True", "compiled again"),
    "torch_compile_backend": ("--torch_compile_backend inductor", "--torch_compile"),
    "torch_compile_mode": ("--torch_compile_mode default", "--torch_compile"),
    "use_liger_kernel": ("--use_liger_kernel True", "no such code for encoders"),
    "liger_kernel_config": ("--liger_kernel_config '{}'", ""),
    "use_cache": ("--use_cache True", "encoders keep no keys"),
    "include_num_input_tokens_seen": ("--include_num_input_tokens_seen True", "cannot count"),
    "accelerator_config": ("""--accelerator_config '{"split_batches": true}'""", "divided among the processes"),
    "parallelism_config": ("--parallelism_config x", ""),
    "train_sampling_strategy": ("--train_sampling_strategy group_by_length", "--batch_size_by_length"),
    "length_column_name": ("--length_column_name size", "drawn"),
    "dataloader_in_order": ("--dataloader_in_order False", "in this order"),
    "remove_unused_columns": ("--remove_unused_columns True", "needs every key"),
    "logging_nan_inf_filter": ("--logging_nan_inf_filter True", "stops the run"),
    "ignore_data_skip": ("--ignore_data_skip True", "goes on with the row where it stopped"),
    "restore_callback_states_from_checkpoint": ("--restore_callback_states_from_checkpoint True", "checkpoint's own"),
    "auto_find_batch_size": ("--auto_find_batch_size True", "would change the batch"),
    "hub_model_id": ("--hub_model_id a/b", PUSH),
    "hub_token": ("--hub_token hf_secret", PUSH),
    "hub_private_repo": ("--hub_private_repo True", PUSH),
    "hub_always_push": ("--hub_always_push True", PUSH),
    "hub_revision": ("--hub_revision v2", PUSH),
    "hub_strategy": ("--hub_strategy end", PUSH),
    "optim_target_modules": ("--optim_target_modules dense", "belongs to the galore and apollo optimizers"),
    "fsdp": ("--fsdp full_shard", "there is none"),
    "fsdp_config": ("""--fsdp_config '{"version": 1}'""", "has no effect without --fsdp"),
    "ddp_backend": ("--ddp_backend gloo", "no effect in a single process"),
    "deepspeed": ("--deepspeed config.json", "pip install deepspeed"),
    "local_rank": ("--local_rank 3", "the environment's LOCAL_RANK decides"),
    "tf32": ("--tf32 True", "requires Ampere"),
}  # fmt: skip

# Beyond one value of each flag.
ALSO_REFUSED = [
    ("--save_strategy best", NEEDS),
    ("--lr_scheduler_type reduce_lr_on_plateau", "requires an eval strategy"),
    ("--lr_scheduler_type greedy", "requires an eval strategy"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: "),
    ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    ("""--lr_scheduler_kwargs '{"cycles": 2}'""", "unexpected keyword argument 'cycles'"),
    ("--lr_scheduler_kwargs cycles=2", "--lr_scheduler_kwargs: expected a JSON mapping"),
    ("""--lr_scheduler_kwargs '{"cycles": 2'""", "--lr_scheduler_kwargs: expected a JSON mapping"),
    ("--fsdp full_shard --fsdp_config /nowhere.json", "or the path of one, got '/nowhere.json'"),
    ("--activation_checkpointing_kwargs '{\"every_n_layers\": 2}'", "no effect without --activation_checkpointing"),
    ("--optim_args momentum=0.9", "--optim_args has no effect with --optim adamw_torch_fused"),
    ("--optim sgd --optim_args momentum", "--optim sgd: "),
    ("--learning_rate -1", "--optim adamw_torch_fused: Invalid learning rate"),
    ("--adam_beta1 2", "Invalid beta parameter"),
    ("--adam_epsilon -1", "Invalid epsilon"),
    ("--weight_decay -1", "--weight_decay must be at least 0"),
    ("--report_to comet_ml", "pip install comet-ml"),
    ("--report_to mlflow tensorboard", "pip install mlflow"),
    ("--half_precision_backend apex", "unknown option --half_precision_backend"),
    ("--use_ipex True", "unknown option --use_ipex"),
]

WORKS = {
    "output_dir": Case("--output_dir {base}/elsewhere", only=("folder",)),
    "per_device_train_batch_size": Case("--per_device_train_batch_size 3", only=("loss",)),
    "num_train_epochs": Case("--num_train_epochs 2", given="--max_steps -1 --num_train_epochs 1", only=("steps",)),
    "max_steps": Case("--max_steps 2", only=("steps",)),
    "learning_rate": Case("--learning_rate 0.1", only=("rates", "loss")),
    "lr_scheduler_type": Case("--lr_scheduler_type constant", only=("rates",)),
    "lr_scheduler_kwargs": Case(
        """--lr_scheduler_kwargs '{{"num_cycles": 3}}'""", given="--lr_scheduler_type cosine", only=("rates",)
    ),
    "warmup_steps": Case("--warmup_steps 2", only=("rates",)),
    "optim": Case("--optim adafactor", only=("optimizer", "loss")),
    "optim_args": Case("--optim_args momentum=0.9", given="--optim sgd", only=("optimizer", "loss")),
    "weight_decay": Case("--weight_decay 0.5", only=("optimizer", "loss")),
    "adam_beta1": Case("--adam_beta1 0.1", only=("optimizer", "loss")),
    "adam_beta2": Case("--adam_beta2 0.5", only=("optimizer", "loss")),
    "adam_epsilon": Case("--adam_epsilon 1", only=("optimizer", "loss")),
    "gradient_accumulation_steps": Case("--gradient_accumulation_steps 2", only=("loss",)),
    "max_grad_norm": Case("--max_grad_norm 0.001", given="--optim sgd --learning_rate 0.1", only=("loss",)),
    "bf16": Case("--bf16", only=("loss",)),
    "fp16": Case("--fp16", only=("warnings",)),
    **{
        name: Case(f"--{name} True", only=("checkpointed",))
        for name in ("activation_checkpointing", "gradient_checkpointing")
    },
    **{
        f"{name}_kwargs": Case(
            f"""--{name}_kwargs '{{{{"every_n_layers": 2}}}}'""", given=f"--{name} True", only=("checkpointed",)
        )
        for name in ("activation_checkpointing", "gradient_checkpointing")
    },
    "torch_empty_cache_steps": Case("--torch_empty_cache_steps 1", only=("emptied",)),
    "logging_strategy": Case("--logging_strategy no", only=("steps",)),
    "logging_steps": Case("--logging_steps 2", only=("steps",)),
    "logging_first_step": Case("--logging_first_step", given="--logging_steps 2", only=("steps",)),
    "log_level": Case("--log_level error", only=("verbosity",)),
    "disable_tqdm": Case("--disable_tqdm False", only=("callbacks",)),
    "report_to": Case("--report_to tensorboard", only=("callbacks", "files")),
    "run_name": Case("--run_name mine", only=("warnings",)),
    "save_only_model": Case("--save_only_model True", given=SAVED, only=("files",)),
    "save_strategy": Case("--save_strategy epoch", only=("files",)),
    "save_steps": Case("--save_steps 2", given=SAVED, only=("files",)),
    "save_total_limit": Case("--save_total_limit 1", given=SAVED, only=("files",)),
    "full_determinism": Case("--full_determinism True", only=("deterministic",)),
    "seed": Case("--seed 4", only=("loss",)),
    "data_seed": Case("--data_seed 5", only=("loss",)),
    "dataloader_drop_last": Case("--dataloader_drop_last True", given="--per_device_train_batch_size 6 --max_steps -1 "
                                 "--num_train_epochs 1", only=("steps",)),
    "dataloader_num_workers": Case("--dataloader_num_workers 1", only=("loader",)),
    "dataloader_persistent_workers": Case(
        "--dataloader_persistent_workers True", given="--dataloader_num_workers 1", only=("loader",)
    ),
    "dataloader_prefetch_factor": Case(
        "--dataloader_prefetch_factor 3", given="--dataloader_num_workers 1", only=("loader",)
    ),
    "dataloader_multiprocessing_context": Case(
        "--dataloader_multiprocessing_context spawn", given="--dataloader_num_workers 1", only=("loader",)
    ),
    "debug": Case("--debug underflow_overflow", only=("hooks",)),
    "skip_memory_metrics": Case("--skip_memory_metrics False", only=("metrics",)),
}  # fmt: skip

# What only several processes show: ``two_flags.py`` says what differs in process 1.
TOGETHER = {
    "log_on_each_node": "--log_on_each_node False",
    "log_level_replica": "--log_level_replica info",
    "save_on_each_node": "--save_on_each_node True",
    "ddp_find_unused_parameters": "--ddp_find_unused_parameters True",
    "ddp_bucket_cap_mb": "--ddp_bucket_cap_mb 3",
    "ddp_broadcast_buffers": "--ddp_broadcast_buffers False",
    "ddp_static_graph": "--ddp_static_graph True",
    "ddp_timeout": "--ddp_timeout 77",
}

ELSEWHERE = {
    "resume_from_checkpoint": "test_resume.py",
    "push_to_hub": "test_push_to_hub.py",
    "enable_jit_checkpoint": "SIGTERM is answered with a checkpoint without it: the tests of stopping",
    "do_train": "run.py trains whether older scripts say so or not",
    **dict.fromkeys(("use_cpu", "dataloader_pin_memory"), "test_flags_of_machines_with_an_accelerator_act"),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "read by the tracker trackio alone, which is not installed here",
    ),
}


def test_no_flag_is_left_out() -> None:
    """A newer transformers' flags show here."""
    everywhere = [REFUSED, WORKS, TOGETHER]
    names = [name for part in everywhere for name in part]
    assert len(names) == len(set(names))
    assert_complete([TrainingArguments], names, ELSEWHERE)


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [*((name, *case) for name, case in REFUSED.items()), *(("", *case) for case in ALSO_REFUSED)],
    ids=[*REFUSED, *(words for words, _ in ALSO_REFUSED)],
)
def test_refused_in_one_line(name: str, words: str, line: str) -> None:
    """Neither the model nor the rows exist: nothing is looked at before the refusal."""
    with pytest.raises(UsageError) as caught:
        check_arguments(parse_arguments([*BASE.split(), *shlex.split(words)]))
    said = str(caught.value)
    assert line in said and "\n" not in said and "hf_secret" not in said
    assert name in said


@pytest.mark.parametrize("name", [kind.value for kind in OptimizerNames])
def test_an_optimizer_is_made_or_its_package_named(name: str) -> None:
    words = [*BASE.split(), "--optim", name]
    if name.startswith(("galore", "apollo")):
        words += ["--optim_target_modules", "dense"]
    try:
        check_arguments(parse_arguments(words))
    except UsageError as refusal:
        said = str(refusal)
        assert "\n" not in said and said.startswith(f"--optim {name}: ")
        assert "install" in said or "import" in said, said


@pytest.fixture(scope="module")
def places(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("flags")
    write_rows(base / "rows/a.jsonl", rows(16))
    return {"model": tiny_model_dir, "base": base, "rows": base / "rows"}


@pytest.fixture(scope="module")
def observed(places: dict[str, Path]) -> Callable[[list[str]], dict[str, Any]]:
    """Train by these words, once for each of them, and say what happened."""

    @cache
    def observe(words: str) -> dict[str, Any]:
        number = len(list(places["base"].iterdir()))
        out = places["base"] / f"out-{number}"
        standard = train_words(places["model"], places["rows"], out, max_steps=3, num_train_epochs=1)
        return _train([*standard, *(word.format(**places) for word in shlex.split(words))], out)

    return lambda words: observe(shlex.join(words))


def _train(words: list[str], out: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        emptied: list[int] = []
        empty = transformers.trainer.clear_device_cache
        patch.setattr(transformers.trainer, "clear_device_cache", lambda: (emptied.append(1), empty())[1])
        warnings: list[str] = []
        patch.setattr("FlagEmbedding.finetune.arguments.logger.warning", lambda *said: warnings.append(said[0]))
        patch.setattr("FlagEmbedding.finetune.checks.logger.warning", lambda *said: warnings.append(said[0]))
        arguments = parse_arguments(words)
        check_arguments(arguments)
        trainer = build_trainer(arguments)
        loader = trainer.get_train_dataloader()
        metrics = trainer.train().metrics
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    modules = list(trainer.bare_model.modules())
    found = {
        "folder": trainer.args.output_dir if trainer.args.output_dir != str(out) else "",
        "files": sorted(str(path.relative_to(out)).split(".out.")[0] for path in out.rglob("*") if path.is_file()),
        "steps": [line["step"] for line in lines] or trainer.state.global_step,
        "loss": [line["loss"] for line in lines],
        "rates": [line["learning_rate"] for line in lines],
        "optimizer": (type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__, str(groups)),
        "checkpointed": sum(bool(getattr(module, "gradient_checkpointing", False)) for module in modules),
        "emptied": len(emptied),
        "verbosity": transformers.logging.get_verbosity(),
        "callbacks": sorted(type(each).__name__ for each in trainer.callback_handler.callbacks),
        "warnings": warnings,
        "deterministic": deterministic,
        "loader": (
            loader.num_workers, loader.prefetch_factor, loader.persistent_workers, str(loader.multiprocessing_context),
        ),
        "hooks": sum(len(module._forward_hooks) for module in modules),
        "metrics": sorted(metrics),
    }  # fmt: skip
    transformers.logging.set_verbosity_warning()
    return found


@pytest.mark.parametrize("name", WORKS)
def test_every_flag_acts(name: str, observed: Callable[[list[str]], dict[str, Any]]) -> None:
    case = WORKS[name]
    assert_acts(Case(case.words, case.given, case.only), observed)


@pytest.mark.parametrize(
    ("words", "expected"), [("", (False, True)), ("--use_cpu True", (True, False)),
                            ("--dataloader_pin_memory False", (False, False))],
)  # fmt: skip
def test_flags_of_machines_with_an_accelerator_act(
    words: str, expected: tuple[bool, bool], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard = train_words(places["model"], places["rows"], places["base"] / "pinned")
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        arguments = parse_arguments([*standard, *words.split()])
    trainer = build_trainer(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (trainer.args.use_cpu, trainer.get_train_dataloader().pin_memory) == expected


def test_every_flag_of_several_processes_acts(places: dict[str, Path]) -> None:
    worker = Path(__file__).with_name("two_flags.py")
    words = shlex.join(train_words(places["model"], places["rows"], places["base"] / "together"))
    command = [sys.executable, *TORCHRUN, str(worker), words, *TOGETHER.values()]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    same = [line for line in answer.stdout.splitlines() if line.startswith("nothing differs")]
    assert same == [] and answer.stdout.count("differs") == len(TOGETHER)


def test_the_command_refuses_before_it_looks_at_model_and_rows(tmp_path: Path) -> None:
    words = [sys.executable, str(REPOSITORY / "run.py"), *BASE.split(), "--optim", "adamw_bnb_8bit"]
    answer = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment()}, check=False
    )
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "error: --optim adamw_bnb_8bit: " in answer.stderr and "pip install -U bitsandbytes" in answer.stderr
    assert list(tmp_path.iterdir()) == []
