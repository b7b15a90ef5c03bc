"""From checked arguments to a trained checkpoint: data first, then the model, then the Trainer.

Argument objects stop here; below, everything takes plain keywords or one frozen configuration.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import set_seed

from FlagEmbedding.finetune.arguments import RetrieverTrainingArguments
from FlagEmbedding.finetune.biencoder import BGEM3Model
from FlagEmbedding.finetune.checkpoints import resolve_resume
from FlagEmbedding.finetune.checks import check_arguments
from FlagEmbedding.finetune.collator import TrainCollator
from FlagEmbedding.finetune.dataset import TrainDataConfig, TrainDataset
from FlagEmbedding.finetune.parsing import Arguments
from FlagEmbedding.finetune.refresh import RefreshNegatives
from FlagEmbedding.finetune.sampler import TaskBatchSampler
from FlagEmbedding.finetune.summary import TrainingSummary
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.mining.hard_negatives.refresh import RefreshSettings
from FlagEmbedding.modeling.encoder import EngineConfig
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.memory import keep_freed_memory
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def run(arguments: Arguments) -> TrainingSummary:
    """Train as ``arguments`` say and save the checkpoint to ``output_dir``.

    Raises:
        UserError: contradicting options, unusable data (before the model is loaded), a loss that cannot go on.
    """
    check_arguments(arguments)
    training = arguments.training
    sharded = bool(training.fsdp or training.deepspeed)
    resume = resolve_resume(training.resume_from_checkpoint, str(training.output_dir), sharded)
    set_seed(training.seed)
    if training.device.type == "cpu":
        keep_freed_memory()
    if is_main():
        transformers.utils.logging.set_verbosity_warning()

    # Process 0 prepares the rows, the others then open what it wrote.
    with training.main_process_first(desc="reading the training data"):
        dataset = TrainDataset(arguments.data.train_data, data_config(arguments))
    sampler = TaskBatchSampler(
        dataset,
        batch_size=training.per_device_train_batch_size,
        seed=dataset.config.seed,
        num_processes=training.world_size,
        drop_last=training.dataloader_drop_last,
    )
    model = build_model(arguments, sharded)
    collator = TrainCollator(
        model.tokenizer,
        query_max_len=arguments.data.query_max_len,
        passage_max_len=arguments.data.passage_max_len,
        with_neg_q=arguments.loss.penalty_weight > 0,
    )
    trainer = BiEncoderTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=model.tokenizer,
        batch_sampler=sampler,
        train_arguments=recorded_arguments(arguments),
    )
    every = arguments.data.refresh_negatives_every_n_epochs
    if every:
        trainer.add_callback(RefreshNegatives(trainer, dataset, every, refresh_settings(arguments)))
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    return TrainingSummary(
        output_dir=Path(str(training.output_dir)),
        history=trainer.state.log_history,
        seconds=time.monotonic() - started,
        steps=trainer.state.global_step,
        pooling=model.pooling,
        normalize=model.normalize,
        moe=getattr(model.model.config, "moe", None),
    )


def data_config(arguments: Arguments) -> TrainDataConfig:
    """What the dataset needs to know, frozen."""
    data = arguments.data
    return TrainDataConfig(
        train_group_size=data.train_group_size,
        seed=arguments.training.seed if arguments.training.data_seed is None else arguments.training.data_seed,
        knowledge_distillation=data.knowledge_distillation,
        same_task_within_batch=data.same_task_within_batch,
        max_example_num_per_dataset=data.max_example_num_per_dataset,
        small_threshold=data.small_threshold,
        drop_threshold=data.drop_threshold,
        batch_size_by_length=data.batch_size_by_length,
        shuffle_ratio=data.shuffle_ratio,
        query_instruction_for_retrieval=data.query_instruction_for_retrieval,
        passage_instruction_for_retrieval=data.passage_instruction_for_retrieval,
        cache_path=data.cache_path,
    )


def refresh_settings(arguments: Arguments) -> RefreshSettings:
    """How negatives are mined again: by the model as it trains."""
    data, training, options = arguments.data, arguments.training, arguments.model
    return RefreshSettings(
        corpus=tuple(data.refresh_corpus),
        range_for_sampling=data.refresh_range_for_sampling,
        relative_margin=data.refresh_relative_margin,
        seed=training.seed if training.data_seed is None else training.data_seed,
        query_length=data.query_max_len,
        passage_length=data.passage_max_len,
        query_instruction=data.query_instruction_for_retrieval,
        passage_instruction=data.passage_instruction_for_retrieval,
        pooling=options.sentence_pooling_method,
        normalize=options.normalize_embeddings,
        dtype="bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
    )


def build_model(arguments: Arguments, sharded: bool) -> BGEM3Model:
    """The model to train, with experts and frozen parts as asked; warns of a router that cannot learn."""
    options, loss, engine = arguments.model, arguments.loss, arguments.engine
    kind = engine.engine
    if sharded and kind == "packed":
        # FSDP and ZeRO-3 gather a layer's weights in its own forward, which the packed engine goes around.
        logger.warning("--fsdp and --deepspeed run the padded engine")
        kind = "padded"
    model = BGEM3Model(
        options.model_name_or_path,
        normlized=options.normalize_embeddings,
        sentence_pooling_method=options.sentence_pooling_method,
        negatives_cross_device=loss.negatives_cross_device,
        temperature=loss.temperature,
        enable_sub_batch=engine.enable_sub_batch,
        unified_finetuning=loss.unified_finetuning,
        use_self_distill=loss.use_self_distill,
        colbert_dim=options.colbert_dim,
        self_distill_start_step=loss.self_distill_start_step,
        moe=options.moe,
        only_train=options.only_train,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        config=options.config_name,
        penalty_weight=loss.penalty_weight,
        router_gradient=options.router_gradient,
        router_aux_loss_coef=options.router_aux_loss_coef,
        router_z_loss_coef=options.router_z_loss_coef,
        router_jitter=options.router_jitter,
        engine=EngineConfig(engine=kind, slab_tokens=engine.slab_tokens, grad_cache=engine.grad_cache),
        fix_encoder=options.fix_encoder,
        fix_position_embedding=options.fix_position_embedding,
        tokenizer_name=options.tokenizer_name,
        cache_dir=options.cache_dir,
    )
    _check_router_options(arguments, model)
    return model


def _check_router_options(arguments: Arguments, model: BGEM3Model) -> None:
    options = arguments.model
    given = [
        f"--{name} {getattr(options, name)}"
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter")
        if getattr(options, name) > 0
    ]
    if options.router_gradient != "none":
        given.append(f"--router_gradient {options.router_gradient}")
    if not model.has_experts:
        if given:
            raise UsageError(f"{given[0]} has no effect without experts: add --moe, or start from a MoE checkpoint")
        return
    aux = options.router_aux_loss_coef > 0 or options.router_z_loss_coef > 0
    if model.model.config.num_experts_per_tok == 1 and options.router_gradient == "none" and not aux:
        logger.warning(
            "one expert a token and --router_gradient none: the router gets no gradient and routing stays random, as "
            "published (--router_gradient straight_through lets it learn)"
        )


def recorded_arguments(arguments: Arguments) -> dict[str, Any]:
    """Everything the command line said, and the versions it ran on, as JSON values; no tokens or keys."""
    training: RetrieverTrainingArguments = arguments.training
    return {
        "model": asdict(arguments.model),
        "data": asdict(arguments.data),
        "objective": asdict(arguments.loss),
        "engine": asdict(arguments.engine),
        "training": training.to_sanitized_dict(),
        "provenance": provenance(),
    }
