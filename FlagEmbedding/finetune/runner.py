"""From checked arguments to a trained checkpoint: data first, then the model, then the Trainer.

Each takes its group of options whole; nothing is copied field by field.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import transformers
from transformers import set_seed

from FlagEmbedding.finetune.arguments import Arguments, RetrieverTrainingArguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.checks import check_arguments, check_dimension, check_lengths, check_router
from FlagEmbedding.finetune.data.collator import TrainCollator
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler
from FlagEmbedding.finetune.hub_upload import check_upload, upload_saved
from FlagEmbedding.finetune.report.settings import block, settings_lines
from FlagEmbedding.finetune.report.summary import TrainingSummary
from FlagEmbedding.finetune.resume.checkpoints import begin, resumable, wants_to_resume
from FlagEmbedding.finetune.resume.damage import undamaged
from FlagEmbedding.finetune.resume.fingerprint import fingerprint
from FlagEmbedding.finetune.resume.interrupt import StopAtStep
from FlagEmbedding.finetune.resume.runs import foreign, refuse_foreign, refuse_other_model, writing
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.modeling.interchange import Instructions, choose
from FlagEmbedding.modeling.options import Pooling
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.heartbeat import watched
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.memory import keep_freed_memory
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
Trained = TypeVar("Trained", bound=BiEncoderTrainer)


@watched("The newest whole checkpoint goes on with --resume_from_checkpoint True")
def run(arguments: Arguments) -> TrainingSummary:
    """Train as ``arguments`` say and save the checkpoint to ``output_dir``.

    Raises:
        UserError: contradicting options, unusable data (before the model is loaded), a loss that cannot go on.
    """
    training, output_dir = arguments.training, Path(str(arguments.training.output_dir))
    candidates = ready(arguments)
    trainer = build_trainer(arguments)
    trainer.run, resume = begin(candidates, trainer.fingerprint, training)
    trainer.train_arguments["run_id"], trainer.changed = trainer.run.id, training.resume_anyway
    lines = settings_lines(trainer, arguments)
    logger.info("%s", block("this run", lines))
    stop, started = StopAtStep(), time.monotonic()
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if not stop.agreed:
            with writing(output_dir, output_dir):
                trainer.save_model()
                trainer.save_state()
            if (dev := getattr(trainer, "dev", None)) is not None:
                dev.measure_widths(trainer.bare_model)
    seconds, state, by = time.monotonic() - started, trainer.state, stop.received if stop.agreed else 0
    history, steps, tokens = state.log_history, state.global_step, state.num_input_tokens_seen
    summary = TrainingSummary(arguments, trainer.bare_model, history, seconds, steps, tokens, by)
    if by:
        return summary
    dev, best = getattr(trainer, "dev", None), state.best_global_step
    if arguments.evaluation.report and is_main():
        # Imported last: it brings Jinja2, and matplotlib where that is installed.
        from FlagEmbedding.finetune.report.change import measure_change
        from FlagEmbedding.finetune.report.run_report import write_report

        change = measure_change(trainer, arguments)
        write_report(summary, dev, best, change)
    card: Callable[..., Path] | None = None
    if arguments.evaluation.model_card and is_main():
        from FlagEmbedding.finetune.report.card import Outcome, write_card

        card = partial(write_card, Outcome(summary, lines, dev, summary.kept_step(best)))
        card()
    upload_saved(summary, card)
    return summary


def ready(arguments: Arguments) -> list[Path]:
    """What comes before anything is loaded: the checkpoints that a run may go on from, the newest first.

    Raises ``UserError`` for what cannot work.
    """
    check_arguments(arguments)
    check_upload(arguments.training)
    check_dimension(arguments)
    training = arguments.training
    output_dir, asked = Path(str(training.output_dir)), training.resume_from_checkpoint
    candidates = on_main(lambda: undamaged(resumable(asked, output_dir, training.sharded), asked))
    if not wants_to_resume(asked):
        on_main(lambda: refuse_foreign(output_dir, foreign(output_dir), training.overwrite_output_dir))
    on_main(lambda: refuse_other_model(output_dir, wants_to_resume(asked)))
    if training.device.type == "cpu":
        keep_freed_memory()
    one_device(training)
    if is_main():
        transformers.utils.logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
    return candidates


def one_device(training: RetrieverTrainingArguments) -> None:
    """One process trains on one device, also where it sees several.

    The Trainer would wrap the model in ``DataParallel`` and scatter a batch by rows: passages would be torn from their
    queries.
    """
    if training.n_gpu > 1:
        logger.warning(
            "one process trains on one device: using %s of %d; for all of them start "
            "'torchrun --nproc_per_node %d run.py …'",
            training.device, training.n_gpu, training.n_gpu,
        )  # fmt: skip
        training._n_gpu = 1


def as_the_model_says(arguments: Arguments, model: BiEncoder) -> Arguments:
    """What was left open filled in from ``model``'s folder, and lengths cut to its positions, in one line each.

    ``model`` learns the instructions that it is trained with, for its checkpoint.
    """
    data, name, said = arguments.data, arguments.model.model_name_or_path, model.instructions
    changes: dict[str, Any] = {}
    limit = longest_input(model.model)
    for flag in ("query_max_len", "passage_max_len"):
        if limit is not None and getattr(data, flag) > limit:
            logger.warning("--%s %d: %s reads at most %d tokens: cutting there", flag, getattr(data, flag), name, limit)
            changes[flag] = limit
    for role in ("query", "passage"):
        flag = f"{role}_instruction_for_retrieval"
        given, stored = getattr(data, flag), getattr(said, role)
        changes[flag] = choose(flag, given, stored, name) or None
        if given is None and stored:
            logger.info("%s says what stands before each %s: %r", name, role, stored)
    data = replace(data, **changes)
    model.instructions = Instructions(data.query_instruction_for_retrieval, data.passage_instruction_for_retrieval)
    pooling = cast(Pooling, model.pooling)
    vectors = replace(arguments.model, sentence_pooling_method=pooling, normalize_embeddings=model.normalize)
    return replace(arguments, data=data, model=vectors)


def make_sampler(arguments: Arguments, dataset: TrainDataset) -> TaskBatchSampler:
    """The batches of all processes."""
    training, shared = arguments.training, arguments.objective.negatives_cross_device
    processes, drop_last, per_step = training.world_size, training.dataloader_drop_last, None
    if training.global_batch_size is not None:
        per_step = processes * training.gradient_accumulation_steps
        # A smaller last batch could not be divided over every number of processes.
        processes, drop_last = (processes, True) if shared else (1, drop_last)
    return TaskBatchSampler(
        dataset, batch_size=training.per_device_train_batch_size, seed=training.sampling_seed, num_processes=processes,
        drop_last=drop_last, per_step=per_step,
    )  # fmt: skip


def build_trainer(arguments: Arguments) -> BiEncoderTrainer:
    """Everything that a run trains with: dataset, sampler, model, collator, and the Trainer that holds them."""
    return build(arguments, BiEncoderTrainer)


def build(arguments: Arguments, kind: type[Trained]) -> Trained:
    """The same with another ``kind`` of Trainer, which evaluates nothing."""
    training, engine = arguments.training, arguments.engine
    set_seed(training.seed)
    # Process 0 prepares the rows, the others then open what it wrote.
    with training.main_process_first(desc="reading the training data"):
        dataset = TrainDataset(arguments.data, training.sampling_seed)
    evaluates: dict[str, Any] = {}
    trainer_class: type[Any] = kind
    if arguments.evaluation.on:
        # Imported only where it is on: it brings evaluation and inference with it.
        from FlagEmbedding.finetune.dev.evaluation import dev_evaluation
        from FlagEmbedding.finetune.dev.trainer import DevTrainer

        dev = dev_evaluation(arguments, dataset)
        if kind is BiEncoderTrainer:
            trainer_class, evaluates = DevTrainer, {"dev": dev}
    sampler = make_sampler(arguments, dataset)
    if training.sharded and not training.sharded_by_layer:
        # FSDP1 and ZeRO-3 gather a layer's weights in its own forward, which the packed engine goes around.
        engine = replace(engine, engine="padded")
    guide, objective = None, arguments.objective
    if objective.guide_model is not None:
        # Imported only where there is one: it brings inference with it.
        from FlagEmbedding.finetune.guide import Guide

        guide = Guide(arguments)
    model = BiEncoder(arguments.model, arguments.experts, objective, engine, lora=arguments.lora)
    model.guide = guide
    model.sharded = training.sharded
    check_router(arguments, model.num_experts_per_tok, model.router)
    arguments = as_the_model_says(arguments, model)
    check_lengths(arguments.data, model.tokenizer)
    dataset.options = arguments.data
    trainer: Trained = trainer_class(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=TrainCollator(
            model.tokenizer,
            arguments.data,
            objective.encodes_neg_q(objective.penalty_weight),
            objective,
            training.sampling_seed,
        ),
        processing_class=model.tokenizer,
        batch_sampler=sampler,
        train_arguments={**arguments.record(), "provenance": provenance()},
        fingerprint=fingerprint(arguments, dataset, sampler, model),
        **evaluates,
    )
    if arguments.refresh.refresh_negatives_every_n_epochs:
        # Imported only where it is on: it brings mining and inference with it.
        from FlagEmbedding.finetune.refresh import RefreshNegatives

        trainer.add_callback(RefreshNegatives(trainer, dataset, arguments))
    return trainer
