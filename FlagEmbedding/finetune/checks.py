"""Options of several groups that contradict each other or have no effect together, refused before anything is loaded.

What one group cannot hold is refused by its class.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from FlagEmbedding.finetune.arguments import Arguments, DataArguments
from FlagEmbedding.finetune.hugging_face import try_out
from FlagEmbedding.modeling.adapters import require_peft
from FlagEmbedding.modeling.files import load_config
from FlagEmbedding.modeling.interchange import read_modules
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.io import read_json
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


def check_arguments(arguments: Arguments) -> None:
    """Raise ``UsageError`` naming the first contradiction; warn of what merely has no effect."""
    for rules in (_numbers, _places, _trained_parts, _lora, _objective, _training, _refresh, _eval_modes):
        for complaint in rules(arguments):
            raise UsageError(complaint)
    if arguments.model.normalize_embeddings is False and arguments.objective.temperature != 1.0:
        logger.warning("--normalize_embeddings False: the temperature is 1, as published")
    if arguments.objective.negatives_cross_device and world_size() == 1:
        logger.warning("--negatives_cross_device has no effect in a single process (start with torchrun)")
    training = arguments.training
    if training.run_name and not training.report_to:
        logger.warning("--run_name has no effect without --report_to")
    if 0 < training.max_steps <= training.warmup_steps:
        logger.warning(
            "--warmup_steps %g of %d steps: the learning rate never gets to %g",
            training.warmup_steps, training.max_steps, training.learning_rate,
        )  # fmt: skip
    try_out(training)
    if training.sharded and not training.sharded_by_layer and arguments.engine.engine == "packed":
        logger.warning("--deepspeed and FSDP version 1 run the padded engine; --fsdp with version 2 runs packed")


def check_dimension(arguments: Arguments) -> None:
    """Refuse ``--matryoshka_dims`` wider than the model's vectors, as its folder's configuration tells them."""
    if not arguments.objective.matryoshka_dims:
        return
    name, cache = arguments.model.model_name_or_path, arguments.model.cache_dir
    folder = resolve_folder(name, cache_dir=cache)
    config = load_config(arguments.model.config_name or name, cache_dir=cache)
    width = int(getattr(config, "hidden_size", 0)) or None
    for projection in read_modules(folder).dense:
        width = int(read_json(projection / "config.json")["out_features"])
    arguments.objective.check_widths(width)


def check_lengths(data: DataArguments, tokenizer: Any) -> None:
    """Refuse lengths that special tokens and instruction fill: every text would be the same. Needs the tokenizer."""
    special = len(tokenizer("")["input_ids"])
    for role in ("query", "passage"):
        most = getattr(data, f"{role}_max_len")
        instruction = getattr(data, f"{role}_instruction_for_retrieval")
        taken = len(tokenizer(instruction)["input_ids"]) if instruction else special
        if most <= taken:
            what = f"the instruction {instruction!r} and " if instruction else ""
            raise UsageError(
                f"--{role}_max_len {most}: {what}{special} special tokens take {taken}, nothing is left of the text: "
                f"give more than {taken}"
            )


def check_router(arguments: Arguments, num_experts_per_tok: int | None, router: str = "learned") -> None:
    """Refuse router options without experts; warn of a router that cannot learn.

    Args:
        num_experts_per_tok: of the model as it was made or loaded; None for a dense one.
        router: its kind.
    """
    experts, objective = arguments.experts, arguments.objective
    values = {name: getattr(objective, name) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
    values |= {"router_jitter": experts.router_jitter, "router_gradient": experts.router_gradient}
    given = [f"--{name} {value}" for name, value in values.items() if value not in (0, "none")]
    if num_experts_per_tok is None and given:
        raise UsageError(f"{given[0]} has no effect without experts: add --moe, or start from a MoE checkpoint")
    if router != "learned":
        if given:
            raise UsageError(f"{given[0]} has no effect with a router by {router}, which has nothing to learn")
        training = arguments.training
        padded = arguments.engine.engine == "padded" or (training.sharded and not training.sharded_by_layer)
        both = "--fsdp, version 2," if training.sharded and not training.sharded_by_layer else "--engine packed"
        # transformers 5 has a second name for it.
        if padded and (training.gradient_checkpointing or getattr(training, "activation_checkpointing", False)):
            raise UsageError(
                f"--gradient_checkpointing on the padded engine computes layers again without the token ids that a "
                f"router by {router} reads: leave one of them out ({both} does both)"
            )
        return
    if num_experts_per_tok == 1 and experts.router_gradient == "none" and not objective.has_router_loss:
        logger.warning(
            "one expert per token and --router_gradient none: the router gets no gradient and routing stays random, as "
            "published (--router_gradient straight_through lets it learn)"
        )


# The least that a number may be, where Hugging Face takes less without a word or with a traceback.
_LEAST = {
    "gradient_accumulation_steps": 1, "max_grad_norm": 0, "dataloader_num_workers": 0, "dataloader_prefetch_factor": 1,
    "save_total_limit": 1, "seed": 0, "data_seed": 0, "warmup_steps": 0, "weight_decay": 0, "ddp_bucket_cap_mb": 1,
}  # fmt: skip


def _numbers(a: Arguments) -> Iterator[str]:
    for group in vars(a).values():
        for each in fields(group):
            value = getattr(group, each.name, None)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"--{each.name} {value}: expected a finite number"
    training = a.training
    for name, least in _LEAST.items():
        if (value := getattr(training, name)) is not None and value < least:
            yield f"--{name} must be at least {least}, got {value}"
    for name in ("seed", "data_seed"):
        if (getattr(training, name) or 0) >= 2**32:
            yield f"--{name} must be below 2^32 (numpy's limit), got {getattr(training, name)}"
    for what in ("logging", "save"):
        steps, strategy = getattr(training, f"{what}_steps"), getattr(training, f"{what}_strategy")
        if strategy == "steps" and steps <= 0:
            yield f"--{what}_steps must be above 0, got {steps:g} (--{what}_strategy no: never)"
    if training.max_steps != -1 and training.max_steps < 1:
        yield f"--max_steps must be at least 1, got {training.max_steps}; for whole epochs leave it out"
    if training.max_steps == -1 and training.num_train_epochs <= 0:
        yield f"--num_train_epochs must be above 0, got {training.num_train_epochs:g}: nothing would train"


def _places(a: Arguments) -> Iterator[str]:
    given = str(a.training.output_dir)
    output = Path(given).resolve()
    if not given.strip():
        yield "--output_dir is empty: name the folder to write to"
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir():
        yield f"--output_dir {given}: {there} is a file, not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        yield f"--output_dir {given}: no permission to write to {there}"
    base = Path(a.model.model_name_or_path).resolve()
    if base.is_dir() and base == output:
        yield f"--output_dir {given} is the folder of --model_name_or_path, which it would overwrite: name another"
    if base.is_dir() and output in base.parents and base.name.startswith("checkpoint-"):
        yield (
            f"--output_dir {given} holds --model_name_or_path among its checkpoints, which this run writes and "
            "removes: name another one, or go on with that run (--resume_from_checkpoint)"
        )
    places = {"output_dir": output} | ({"cache_path": Path(a.data.cache_path).resolve()} if a.data.cache_path else {})
    for rows in map(Path, a.data.train_data):
        folder = rows.resolve() if rows.is_dir() else rows.resolve().parent
        for name, place in places.items():
            if place == folder or (rows.is_dir() and folder in place.parents):
                yield f"--{name} {place} lies in --train_data {rows}: what is written there would be read as rows"
        if rows.exists() and output in rows.resolve().parents:
            yield f"--train_data {rows} lies in --output_dir {given}, which this run writes: move one of them"


def _trained_parts(a: Arguments) -> Iterator[str]:
    if a.model.fix_encoder and not a.objective.unified_finetuning:
        yield (
            "--fix_encoder trains the sparse and colbert heads alone, and without --unified_finetuning True there are "
            "none: nothing would train"
        )
    if a.model.fix_encoder and (a.experts.only_train or a.experts.moe):
        frozen = "only_train" if a.experts.only_train else "moe"
        yield f"--fix_encoder freezes what --{frozen} would train: give one of them"
    if a.experts.only_train and a.model.fix_position_embedding:
        yield "--fix_position_embedding has no effect with --only_train, which freezes all embeddings: leave it out"


def _lora(a: Arguments) -> Iterator[str]:
    if not a.lora.lora_r:
        return
    require_peft("--lora_r")
    if a.training.sharded:
        yield "--lora_r does not work with --fsdp or --deepspeed: adapters are small, each process holds them whole"
    if a.model.fix_encoder:
        yield "--lora_r adapts the encoder, which --fix_encoder freezes: give one of them"
    if a.model.fix_position_embedding:
        yield "--fix_position_embedding has no effect with --lora_r, which freezes all embeddings: leave it out"
    if a.experts.moe and set(a.lora.lora_target) == {"attention"}:
        yield f"--moe {a.experts.moe} with --lora_target attention leaves all experts the same: say ffn or all"
    if a.experts.moe and a.experts.num_experts > 1 and a.lora.lora_save == "adapter":
        yield (
            f"--lora_save adapter names a base to go into, which has no experts where --moe {a.experts.moe} makes "
            "them: say --lora_save merged"
        )


def _objective(a: Arguments) -> Iterator[str]:
    loss = a.objective
    in_batch = a.training.per_device_train_batch_size * (world_size() if loss.negatives_cross_device else 1)
    if a.data.train_group_size == 1 and in_batch == 1 and not a.data.batch_size_by_length:
        yield (
            "--train_group_size 1 with --per_device_train_batch_size 1 leaves no negative, the loss would be 0 for "
            "ever: raise --train_group_size to at least 2"
        )
    for given, name, needed, there in (
        (loss.use_self_distill, "use_self_distill", "unified_finetuning", loss.unified_finetuning),
        (loss.self_distill_start_step != -1, "self_distill_start_step", "use_self_distill", loss.use_self_distill),
        (a.model.colbert_dim != -1, "colbert_dim", "unified_finetuning", loss.unified_finetuning),
    ):
        if given and not there:
            yield f"--{name} has no effect without --{needed} True"
    yield from _beyond_the_published(a)


def _beyond_the_published(a: Arguments) -> Iterator[str]:
    loss, teacher = a.objective, a.data.knowledge_distillation
    kl = loss.distill_loss == "kl"
    for given, name in ((kl, "distill_loss kl"), (loss.distill_temperature != 1, "distill_temperature")):
        if given and not teacher:
            yield f"--{name} has no effect without --knowledge_distillation True"
    if kl and loss.masks:
        name = "mask_twins" if loss.mask_twins else "false_negative_margin"
        yield f"--{name} and --distill_loss kl, which compares each query's own passages alone: give one of them"
    if loss.neg_q_as_rows and teacher:
        yield "--neg_q_as_rows with --knowledge_distillation: there is no teacher of these rows; give one of them"
    if loss.neg_q_as_rows and loss.unified_finetuning:
        yield "--neg_q_as_rows with --unified_finetuning: neg_q has dense vectors alone; give one of them"
    if loss.neg_q_as_rows and loss.guide_model:
        yield "--neg_q_as_rows with --guide_model: the guide does not read neg_q; leave --guide_model out"
    if a.data.train_group_size == 1 and (loss.neg_q_as_rows or loss.neg_q_control != "none"):
        name = "neg_q_as_rows" if loss.neg_q_as_rows else f"neg_q_control {loss.neg_q_control}"
        yield f"--{name} has no effect with --train_group_size 1, which draws no negatives"


def _training(a: Arguments) -> Iterator[str]:
    if a.experts.router == "hash" and a.objective.has_router_loss:
        name = "router_aux_loss_coef" if a.objective.router_aux_loss_coef else "router_z_loss_coef"
        yield f"--{name} has no effect with --router hash, which has nothing to learn"
    if a.engine.grad_cache and a.training.sharded:
        yield "--grad_cache does not work with --fsdp or --deepspeed: weights are gathered layer by layer"
    if a.training.ema_decay is not None and a.training.sharded:
        yield "--ema_decay does not work with --fsdp or --deepspeed, which divide the weights: leave it out"
    if a.training.fsdp and a.training.use_cpu:
        yield "--fsdp divides a model over accelerators, and there is none: leave it out (DDP trains on CPUs)"


def _eval_modes(a: Arguments) -> Iterator[str]:
    heads = [mode.name for mode in a.evaluation.other_modes if {"sparse", "colbert"} & set(mode.parts)]
    if heads and not a.objective.unified_finetuning:
        yield f"--eval_modes {heads[0]} needs --unified_finetuning True, which trains the heads that it measures"


def _refresh(a: Arguments) -> Iterator[str]:
    every, given = a.refresh.refresh_negatives_every_n_epochs, "--refresh_negatives_every_n_epochs"
    if every == 0:
        return
    for path in a.refresh.refresh_corpus:
        if not Path(path).exists():
            yield f"--refresh_corpus {path}: there is no such file or folder"
    if a.training.max_steps <= 0 and a.training.num_train_epochs <= every:
        yield f"{given} {every} has no effect in {a.training.num_train_epochs:g} epoch(s): train longer"
    if a.data.train_group_size == 1:
        yield f"{given} has no effect with --train_group_size 1, which draws no negatives"
    if a.data.knowledge_distillation:
        yield f"{given} with --knowledge_distillation: the teacher's scores belong to the negatives that are exchanged"
    if a.training.sharded:
        yield f"{given} does not work with --fsdp or --deepspeed: mine between two runs instead"
    if a.training.dataloader_persistent_workers:
        yield f"{given} with --dataloader_persistent_workers: such workers keep the old rows; leave the latter out"
