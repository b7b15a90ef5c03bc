"""From checked arguments to a trained checkpoint: data first, then the model, then the Trainer.

Each takes its group of options whole; nothing is copied field by field.
"""

from __future__ import annotations

import time
from dataclasses import replace

import transformers
from transformers import set_seed

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.checkpoints import resolve_resume
from FlagEmbedding.finetune.checks import check_arguments, check_router
from FlagEmbedding.finetune.collator import TrainCollator
from FlagEmbedding.finetune.dataset import TrainDataset
from FlagEmbedding.finetune.sampler import TaskBatchSampler
from FlagEmbedding.finetune.summary import TrainingSummary
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.memory import keep_freed_memory
from FlagEmbedding.utils.provenance import provenance


def run(arguments: Arguments) -> TrainingSummary:
    """Train as ``arguments`` say and save the checkpoint to ``output_dir``.

    Raises:
        UserError: contradicting options, unusable data (before the model is loaded), a loss that cannot go on.
    """
    check_arguments(arguments)
    training = arguments.training
    resume = resolve_resume(training.resume_from_checkpoint, str(training.output_dir), training.sharded)
    if training.device.type == "cpu":
        keep_freed_memory()
    if is_main():
        transformers.utils.logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    trainer = build_trainer(arguments)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    seconds, state = time.monotonic() - started, trainer.state
    return TrainingSummary(arguments, trainer.bare_model, state.log_history, seconds, state.global_step)


def build_trainer(arguments: Arguments) -> BiEncoderTrainer:
    """Everything that a run trains with: dataset, sampler, model, collator, and the Trainer that holds them."""
    training, engine = arguments.training, arguments.engine
    set_seed(training.seed)
    # Process 0 prepares the rows, the others then open what it wrote.
    with training.main_process_first(desc="reading the training data"):
        dataset = TrainDataset(arguments.data, training.sampling_seed)
    sampler = TaskBatchSampler(
        dataset, batch_size=training.per_device_train_batch_size, seed=training.sampling_seed,
        num_processes=training.world_size, drop_last=training.dataloader_drop_last,
    )  # fmt: skip
    if training.sharded:
        # FSDP and ZeRO-3 gather a layer's weights in its own forward, which the packed engine goes around.
        engine = replace(engine, engine="padded")
    model = BiEncoder(arguments.model, arguments.experts, arguments.objective, engine)
    check_router(arguments, model.num_experts_per_tok)
    trainer = BiEncoderTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=TrainCollator(model.tokenizer, arguments.data, with_neg_q=arguments.objective.penalty_weight > 0),
        processing_class=model.tokenizer,
        batch_sampler=sampler,
        train_arguments={**arguments.record(), "provenance": provenance()},
    )
    if arguments.refresh.refresh_negatives_every_n_epochs:
        # Imported only where it is on: it brings mining and inference with it.
        from FlagEmbedding.finetune.refresh import RefreshNegatives

        trainer.add_callback(RefreshNegatives(trainer, dataset, arguments))
    return trainer
