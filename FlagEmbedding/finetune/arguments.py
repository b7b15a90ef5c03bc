"""The options of ``run.py``, grouped by who reads them, with every published flag and the right spellings beside them.

``MoEConfig`` and ``EngineConfig`` are the encoder's own (``modeling.options``), ``ObjectiveArguments`` the objective's
(``losses.objective``); the groups here are the bi-encoder's, the dataset's, and Hugging Face's ``TrainingArguments``
with some defaults of ours. Each travels whole to its reader. What a group cannot hold is refused where it is made, what
two groups contradict each other in by ``checks.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from FlagEmbedding.finetune.dev.arguments import EvaluationArguments, before
from FlagEmbedding.finetune.hugging_face import refuse_reporters, refuse_unserved
from FlagEmbedding.finetune.resume.global_batch import divide
from FlagEmbedding.losses.objective import ObjectiveArguments
from FlagEmbedding.modeling.adapter_options import LoraOptions
from FlagEmbedding.modeling.options import POOLING_SPELLINGS, EngineConfig, MoEConfig, Pooling
from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.distributed import check_launcher, world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import NO_CPU_BF16, cpu_has_bf16
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.ranks import parse_range

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelArguments:
    """Model: which checkpoint is trained, how its vectors are made, and what is frozen."""

    model_name_or_path: str = option(help="Hub id or folder of the model; a MoE checkpoint continues as it is.")
    config_name: str | None = option(None, "Another configuration than the model's.")
    tokenizer_name: str | None = option(None, "Another tokenizer than the model's.")
    cache_dir: str | None = option(None, "Where models from the hub are kept.")
    fix_position_embedding: bool = switch(False, "Freeze the position embeddings.")
    fix_encoder: bool = switch(False, "Train the sparse and colbert heads alone.")
    sentence_pooling_method: Pooling | None = choice(
        Pooling,
        None,
        "Which hidden states become the dense vector; default: what the model's folder says, else cls.",
        spellings=POOLING_SPELLINGS,
    )
    normalize_embeddings: bool | None = switch(
        None,
        "L2-normalize dense (and colbert) vectors; default: what the model's folder says, else True. Published "
        "spelling: --normlized.",
        "--normlized",
        "--normalized",
    )
    colbert_dim: int = option(-1, "Width of the colbert vectors; -1: the hidden size.")

    def __post_init__(self) -> None:
        if self.colbert_dim == 0 or self.colbert_dim < -1:
            raise UsageError(f"--colbert_dim must be -1 (the hidden size) or at least 1, got {self.colbert_dim}")


@dataclass(frozen=True)
class DataArguments:
    """Training data: which rows are trained on and how they become batches."""

    train_data: list[str] = option(
        help="Files or folders of rows (.json, .jsonl, .parquet …), saved datasets, ids of the hub."
    )
    knowledge_distillation: bool = switch(False, "Use pos_scores and neg_scores of the rows as the teacher.")
    cache_path: str | None = option(None, "Where the prepared rows are kept.")
    train_group_size: int = option(8, "Passages per query: 1 positive, the rest negatives.")
    query_max_len: int = option(32, "Tokens of a query; longer ones are cut.")
    passage_max_len: int = option(128, "Tokens of a passage or neg_q; longer ones are cut.")
    max_example_num_per_dataset: int | None = option(None, "Sample at most this many rows of each file.")
    query_instruction_for_retrieval: str | None = option(
        None, "Text put before queries; default: what the model's folder says ('': nothing)."
    )
    passage_instruction_for_retrieval: str | None = option(None, "Text put before passages; default: likewise.")
    neg_q_instruction: bool = switch(
        True, "Put the query instruction before the queries of negatives (neg_q) too; False: none there, as published."
    )
    same_task_within_batch: bool = switch(False, "Draw each batch from one file.")
    shuffle_ratio: float = option(0.0, "Chance that a passage of over 100 characters becomes 3 shuffled chunks.")
    small_threshold: int = option(0, "Files of fewer rows than this are merged, folder by folder.")
    drop_threshold: int = option(0, "A merged set of fewer rows than this is dropped.")
    batch_size_by_length: bool = switch(
        False,
        "For files named …len-0-500.jsonl to …len-7000-inf.jsonl and group size 8 or 1: take the batch size from "
        "upstream's table for 80 GB cards. Upstream did this silently; here only when asked.",
    )

    def __post_init__(self) -> None:
        for name in ("train_group_size", "query_max_len", "passage_max_len", "max_example_num_per_dataset"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        if not 0 <= self.shuffle_ratio <= 1:
            raise UsageError(f"--shuffle_ratio is a chance in [0, 1], got {self.shuffle_ratio}")
        if self.knowledge_distillation and self.train_group_size == 1:
            raise UsageError(
                "--knowledge_distillation with --train_group_size 1 leaves the teacher nothing to rank: raise the size"
            )
        if self.batch_size_by_length and self.train_group_size not in (1, 8):
            size = self.train_group_size
            raise UsageError(f"--batch_size_by_length has a table for --train_group_size 8 and 1 only, got {size}")
        if self.batch_size_by_length and not self.same_task_within_batch:
            raise UsageError("--batch_size_by_length goes by file, so it needs --same_task_within_batch True")


@dataclass(frozen=True)
class RefreshArguments:
    """Negatives mined again while training."""

    refresh_negatives_every_n_epochs: int = option(
        0, "Mine negatives again with the current weights every N epochs (ANCE); 0: never."
    )
    refresh_corpus: list[str] = option(
        [], "Where they come from: JSON lines with text; default: the passages of the training rows."
    )
    refresh_range_for_sampling: str = option(
        "10-210", "Which ranks, as in mining: A-B are places A+1 to B of the search."
    )
    refresh_relative_margin: float | None = option(None, "Leave out what scores above the positive less this share.")

    def __post_init__(self) -> None:
        every, given = self.refresh_negatives_every_n_epochs, "--refresh_negatives_every_n_epochs"
        if every < 0:
            raise UsageError(f"{given} must be 0 (never) or more, got {every}")
        defaults = {each.name: each.default for each in fields(self)} | {"refresh_corpus": []}
        for name, value in vars(self).items() if every == 0 else ():
            if value != defaults[name]:
                raise UsageError(f"--{name} has no effect without {given}")
        parse_range(self.refresh_range_for_sampling)
        if (self.refresh_relative_margin or 0.0) < 0:
            raise UsageError(f"--refresh_relative_margin must not be negative, got {self.refresh_relative_margin}")


@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """Hugging Face TrainingArguments; see their documentation for the rest.

    Changed defaults: rows keep all their columns, a non-finite loss stops the run instead of being averaged away, and
    DDP does not search for unused parameters.
    """

    remove_unused_columns: bool = switch(False, "Kept False: the collator needs every key.")
    logging_nan_inf_filter: bool = switch(False, "Kept False: a non-finite loss stops the run.")
    ddp_find_unused_parameters: bool | None = switch(
        False, "Every trained parameter gets a gradient at each step, so there is nothing to find."
    )
    overwrite_output_dir: bool = switch(
        False,
        "Starting afresh where another run's checkpoints lie: remove them (only files that their records list) "
        "instead of refusing.",
    )
    global_batch_size: int | None = option(
        None,
        "Queries per optimizer step over all processes; the accumulation follows (with --negatives_cross_device the "
        "batch size). Batches then do not depend on the number of processes, which may change when a run goes on.",
    )
    resume_anyway: bool = switch(
        False, "Go on from a checkpoint with other options than its run was started with; each is named."
    )
    plan: bool = switch(
        False, "Say what the run would do and cost, by three steps that are thrown away; write nothing."
    )
    warmup_ratio: float | None = option(
        None, "Share of the steps for a linear warmup (older spelling of a warmup_steps < 1)."
    )
    ema_decay: float | None = option(
        None,
        "Average the trained weights over the steps: average ← d · average + (1 − d) · weights. The average is "
        "evaluated on dev and saved at the end. Default: no average.",
    )

    def __post_init__(self) -> None:
        refuse_unserved(self)
        if self.warmup_ratio is not None:
            if self.warmup_steps:
                raise UsageError("--warmup_ratio and --warmup_steps both say how long to warm up: give one of them")
            if not 0 <= self.warmup_ratio < 1:
                raise UsageError(f"--warmup_ratio is a share of the steps, from 0 to below 1, got {self.warmup_ratio}")
            self.warmup_steps = self.warmup_ratio
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UsageError(
                f"--ema_decay is the share of the average that a step keeps, between 0 and 1, got {self.ema_decay}"
            )
        if self.enable_jit_checkpoint:
            # Hugging Face's counts the step that is broken off twice.
            logger.info("--enable_jit_checkpoint: run.py writes a checkpoint on SIGTERM without it, and by itself")
            self.enable_jit_checkpoint = False
        if self.fp16 and self.bf16:
            raise UsageError("--fp16 and --bf16 exclude each other: give one of them")
        if (size := self.per_device_train_batch_size) < 1:
            raise UsageError(f"--per_device_train_batch_size must be at least 1, got {size}")
        if self.ddp_timeout < 1:
            raise UsageError(f"--ddp_timeout is a number of seconds, at least 1, got {self.ddp_timeout}")
        # Without any accelerator say so to the Trainer: it refuses bf16 otherwise.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.fp16 and self.use_cpu:
            # GradScaler and half-precision kernels need a GPU; published command lines say --fp16 everywhere.
            self.fp16 = False
            self.bf16 = cpu_has_bf16()
            logger.warning("--fp16 needs a GPU: going on in %s", "bf16" if self.bf16 else "fp32")
        elif self.bf16 and self.use_cpu and not cpu_has_bf16():
            logger.warning("--bf16: %s", NO_CPU_BF16)
        check_launcher()
        if self.use_cpu and world_size() > 1 and self.ddp_backend in (None, "gloo") and not dist.is_initialized():
            # The Trainer would make the group without --ddp_timeout on a CPU.
            dist.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        before(self)
        # Hugging Face wants saving and evaluating to match for the best model; here each new best is saved by itself.
        best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.load_best_model_at_end = best
        if not self.use_cpu and self.dataloader_pin_memory and isinstance(self.accelerator_config, AcceleratorConfig):
            self.accelerator_config.non_blocking = True  # batches come page-locked: nothing waits for their copies
        refuse_reporters([self.report_to] if isinstance(self.report_to, str) else self.report_to or [])

    @property
    def sampling_seed(self) -> int:
        """What rows and batches are drawn by: ``data_seed``, or the seed of everything else."""
        return self.seed if self.data_seed is None else self.data_seed

    def deals_out_batches(self, shared: bool) -> bool:
        """True where the batches of a step go to the processes in turn: each is the same however many there are.

        Args:
            shared: the queries of all processes share their negatives (``--negatives_cross_device``).
        """
        return self.global_batch_size is not None and not shared

    @property
    def sharded(self) -> bool:
        """True when FSDP or DeepSpeed divides the model."""
        return bool(self.fsdp or self.deepspeed)

    @property
    def sharded_by_layer(self) -> bool:
        """True for FSDP2, which the packed engine runs under."""
        config = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
        return bool(self.fsdp and not self.deepspeed and int(config.get("version", 2)) == 2)

    @property
    def dtype_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """What the model computes in."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class Arguments:
    """All groups of ``run.py``, in the order of ``--help``."""

    model: ModelArguments
    experts: MoEConfig
    lora: LoraOptions
    data: DataArguments
    objective: ObjectiveArguments
    engine: EngineConfig
    refresh: RefreshArguments
    evaluation: EvaluationArguments
    training: RetrieverTrainingArguments

    def __post_init__(self) -> None:
        training, shared = self.training, self.objective.negatives_cross_device
        if (total := training.global_batch_size) is None:
            return
        if self.data.batch_size_by_length:
            raise UsageError("--batch_size_by_length takes batch sizes from a table: leave --global_batch_size out")
        if training.deepspeed:
            raise UsageError("--global_batch_size does not work with --deepspeed, whose configuration has its own")
        batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
        batch, accumulation = divide(total, training.world_size, batch, accumulation, shared)
        training.per_device_train_batch_size, training.gradient_accumulation_steps = batch, accumulation

    def record(self) -> dict[str, Any]:
        """Everything the command line said, as JSON values; no tokens or keys."""
        groups = {name: asdict(group) for name, group in vars(self).items() if name != "training"}
        return {**groups, "training": self.training.to_sanitized_dict()}
