"""Options of several groups that contradict each other or have no effect together, refused before anything is loaded.

What one group cannot hold is refused by its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


def check_arguments(arguments: Arguments) -> None:
    """Raise ``UsageError`` naming the first contradiction; warn of what merely has no effect."""
    for rules in (_trained_parts, _objective, _training, _refresh):
        for complaint in rules(arguments):
            raise UsageError(complaint)
    if arguments.model.normalize_embeddings is False and arguments.objective.temperature != 1.0:
        logger.warning("--normalize_embeddings False: the temperature is 1, as published")
    if arguments.objective.negatives_cross_device and world_size() == 1:
        logger.warning("--negatives_cross_device has no effect in a single process (start with torchrun)")
    training = arguments.training
    if training.sharded and not training.sharded_by_layer and arguments.engine.engine == "packed":
        logger.warning("--deepspeed and FSDP version 1 run the padded engine; --fsdp with version 2 runs packed")


def check_router(arguments: Arguments, num_experts_per_tok: int | None) -> None:
    """Refuse router options without experts; warn of a router that cannot learn.

    Args:
        num_experts_per_tok: of the model as it was made or loaded; None for a dense one.
    """
    experts, objective = arguments.experts, arguments.objective
    values = {name: getattr(objective, name) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
    values |= {"router_jitter": experts.router_jitter, "router_gradient": experts.router_gradient}
    given = [f"--{name} {value}" for name, value in values.items() if value not in (0, "none")]
    if num_experts_per_tok is None and given:
        raise UsageError(f"{given[0]} has no effect without experts: add --moe, or start from a MoE checkpoint")
    if num_experts_per_tok == 1 and experts.router_gradient == "none" and not objective.has_router_loss:
        logger.warning(
            "one expert per token and --router_gradient none: the router gets no gradient and routing stays random, as "
            "published (--router_gradient straight_through lets it learn)"
        )


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


def _training(a: Arguments) -> Iterator[str]:
    if a.engine.grad_cache and a.training.sharded:
        yield "--grad_cache does not work with --fsdp or --deepspeed: weights are gathered layer by layer"
    if a.training.auto_find_batch_size:
        yield (
            "--auto_find_batch_size would change the batch, and with it the loss, in mid-run: leave it out; "
            "--grad_cache True bounds memory at any batch size"
        )
    if a.training.fsdp and a.training.use_cpu:
        yield "--fsdp divides a model over accelerators, and there is none: leave it out (DDP trains on CPUs)"


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
