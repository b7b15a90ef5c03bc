"""Options that contradict each other or have no effect together, refused in one line before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from FlagEmbedding.finetune.parsing import Arguments
from FlagEmbedding.mining.hard_negatives.filters import parse_range
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


def check_arguments(arguments: Arguments) -> None:
    """Raise ``UsageError`` naming the first contradiction; warn of what merely has no effect."""
    for rules in (_ranges, _experts, _trained_parts, _objective, _engine, _training, _refresh):
        for complaint in rules(arguments):
            raise UsageError(complaint)
    if not arguments.model.normalize_embeddings and arguments.loss.temperature != 1.0:
        logger.warning("--normalize_embeddings False: the temperature is 1, as published")
    if arguments.loss.negatives_cross_device and world_size() == 1:
        logger.warning("--negatives_cross_device has no effect in a single process (start with torchrun)")


def _ranges(a: Arguments) -> Iterator[str]:
    at_least_one = {
        "num_experts": a.model.num_experts,
        "num_experts_per_tok": a.model.num_experts_per_tok,
        "train_group_size": a.data.train_group_size,
        "query_max_len": a.data.query_max_len,
        "passage_max_len": a.data.passage_max_len,
        "per_device_train_batch_size": a.training.per_device_train_batch_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            yield f"--{name} must be at least 1, got {value}"
    if not 0 <= a.loss.penalty_weight <= 1:
        yield f"--penalty_weight is λ in [0, 1], got {a.loss.penalty_weight}"
    if a.loss.temperature <= 0:
        yield f"--temperature must be above 0, got {a.loss.temperature}"
    if not 0 <= a.data.shuffle_ratio <= 1:
        yield f"--shuffle_ratio is a chance in [0, 1], got {a.data.shuffle_ratio}"
    if not 0 <= a.model.router_jitter < 1:
        yield f"--router_jitter must be in [0, 1), got {a.model.router_jitter}"
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if getattr(a.model, name) < 0:
            yield f"--{name} must not be negative, got {getattr(a.model, name)}"
    if a.model.colbert_dim == 0 or a.model.colbert_dim < -1:
        yield f"--colbert_dim must be -1 (the hidden size) or at least 1, got {a.model.colbert_dim}"
    if a.data.max_example_num_per_dataset is not None and a.data.max_example_num_per_dataset < 1:
        yield f"--max_example_num_per_dataset must be at least 1, got {a.data.max_example_num_per_dataset}"


def _experts(a: Arguments) -> Iterator[str]:
    m = a.model
    if m.num_experts_per_tok > m.num_experts:
        yield (
            f"--num_experts_per_tok {m.num_experts_per_tok} is more than --num_experts {m.num_experts}: "
            "a token cannot be sent to more experts than there are"
        )
    if m.moe is None and m.num_experts > 1:
        yield f"--num_experts {m.num_experts} has no effect without --moe: add --moe intermediate or --moe output"
    if m.moe and m.only_train and m.moe != m.only_train:
        yield (
            f"--moe {m.moe} with --only_train {m.only_train} would leave every expert frozen: "
            f"use --only_train {m.moe} or leave --only_train out"
        )


def _trained_parts(a: Arguments) -> Iterator[str]:
    m = a.model
    if m.fix_encoder and not a.loss.unified_finetuning:
        yield (
            "--fix_encoder trains the sparse and colbert heads alone, and without --unified_finetuning True there are "
            "none: nothing would train"
        )
    if m.fix_encoder and (m.only_train or m.moe):
        yield f"--fix_encoder freezes what --{'only_train' if m.only_train else 'moe'} would train: give one of them"
    if m.only_train and m.fix_position_embedding:
        yield "--fix_position_embedding has no effect with --only_train, which freezes all embeddings: leave it out"


def _objective(a: Arguments) -> Iterator[str]:
    in_batch = a.training.per_device_train_batch_size * (world_size() if a.loss.negatives_cross_device else 1)
    if a.data.train_group_size == 1 and in_batch == 1 and not a.data.batch_size_by_length:
        yield (
            "--train_group_size 1 with --per_device_train_batch_size 1 leaves no negative, the loss would be 0 for "
            "ever: raise --train_group_size to at least 2"
        )
    if a.loss.use_self_distill and not a.loss.unified_finetuning:
        yield "--use_self_distill has no effect without --unified_finetuning True"
    if a.loss.self_distill_start_step != -1 and not a.loss.use_self_distill:
        yield "--self_distill_start_step has no effect without --use_self_distill True"
    if a.model.colbert_dim != -1 and not a.loss.unified_finetuning:
        yield "--colbert_dim has no effect without --unified_finetuning True"
    if a.data.knowledge_distillation and a.data.train_group_size == 1:
        yield "--knowledge_distillation with --train_group_size 1 leaves the teacher nothing to rank: raise the size"
    if a.data.batch_size_by_length and a.data.train_group_size not in (1, 8):
        yield (f"--batch_size_by_length has a table for --train_group_size 8 and 1 only, got {a.data.train_group_size}")


def _engine(a: Arguments) -> Iterator[str]:
    if a.engine.slab_tokens < 0:
        yield f"--slab_tokens must be 0 (the batch as one) or more, got {a.engine.slab_tokens}"
    if a.engine.grad_cache and a.engine.engine == "padded":
        yield "--grad_cache works on the slabs of --engine packed: leave --engine padded out"
    if a.engine.engine == "packed" and (a.training.fsdp or a.training.deepspeed) and a.engine.grad_cache:
        yield "--grad_cache does not work with --fsdp or --deepspeed, which run the padded engine"


def _training(a: Arguments) -> Iterator[str]:
    if a.training.eval_strategy != "no":  # an enum that compares to its text
        yield (
            f"--eval_strategy {getattr(a.training.eval_strategy, 'value', a.training.eval_strategy)}: "
            "run.py does not evaluate while training; "
            "use evaluation/step0 to step2 on the checkpoints"
        )
    if a.training.load_best_model_at_end:
        yield "--load_best_model_at_end needs evaluation while training, which run.py does not do"


def _refresh(a: Arguments) -> Iterator[str]:
    every, given = a.data.refresh_negatives_every_n_epochs, "--refresh_negatives_every_n_epochs"
    if every < 0:
        yield f"{given} must be 0 (never) or more, got {every}"
    if every == 0:
        fields = type(a.data).__dataclass_fields__
        window = fields["refresh_range_for_sampling"].default
        untouched: dict[str, object] = {"refresh_corpus": [], "refresh_range_for_sampling": window}
        for name in ("refresh_corpus", "refresh_range_for_sampling", "refresh_relative_margin"):
            if getattr(a.data, name) != untouched.get(name):
                yield f"--{name} has no effect without {given}"
        return
    parse_range(a.data.refresh_range_for_sampling)
    for path in a.data.refresh_corpus:
        if not Path(path).exists():
            yield f"--refresh_corpus {path}: there is no such file or folder"
    if (a.data.refresh_relative_margin or 0.0) < 0:
        yield f"--refresh_relative_margin must not be negative, got {a.data.refresh_relative_margin}"
    if a.training.max_steps <= 0 and a.training.num_train_epochs <= every:
        yield f"{given} {every} has no effect in {a.training.num_train_epochs:g} epoch(s): train longer"
    if a.data.train_group_size == 1:
        yield f"{given} has no effect with --train_group_size 1, which draws no negatives"
    if a.data.knowledge_distillation:
        yield f"{given} with --knowledge_distillation: the teacher's scores belong to the negatives that are exchanged"
    if a.training.fsdp or a.training.deepspeed:
        yield f"{given} does not work with --fsdp or --deepspeed: mine between two runs instead"
    if a.training.dataloader_persistent_workers:
        yield f"{given} with --dataloader_persistent_workers: such workers keep the old rows; leave the latter out"
