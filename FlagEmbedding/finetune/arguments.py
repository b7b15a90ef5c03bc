"""The arguments of ``run.py``, in groups, with every published flag and the right spellings beside them.

Five dataclasses: which model and experts, which data, which objective, how it is computed, and Hugging Face's own
``TrainingArguments`` with three defaults of ours. Contradictions are refused in ``checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import cpu_has_bf16
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

FFN_PART = Literal["intermediate", "output"]


@dataclass
class ModelArguments:
    """Which checkpoint is trained, which of its layers become experts, and which parameters train."""

    _argument_group_name: ClassVar[str] = "model and experts"

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the model to train; a MoE checkpoint continues as it is."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Another configuration than the model's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where models from the hub are kept."})
    moe: FFN_PART | None = field(
        default=None,
        metadata={
            "help": "Which linear of every feed-forward becomes experts: intermediate (H to I) or output (I to H)."
        },
    )
    only_train: FFN_PART | None = field(
        default=None, metadata={"help": "Train only encoder.layer.*.{this}.dense.* (experts and router included)."}
    )
    num_experts: int = field(default=1, metadata={"help": "Copies of each linear (N)."})
    num_experts_per_tok: int = field(default=1, metadata={"help": "Experts a token is sent to (k)."})
    router_gradient: Literal["none", "straight_through"] = field(
        default="none",
        metadata={
            "help": "none: as published (with k = 1 the router gets no gradient at all); straight_through: the same "
            "forward to the bit, and the gradient of the full softmax reaches the router."
        },
    )
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the Switch load balance loss."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    router_jitter: float = field(
        default=0.0, metadata={"help": "The router's input is multiplied by uniform noise in 1 ± this while training."}
    )
    fix_position_embedding: bool = field(default=False, metadata={"help": "Freeze the position embeddings."})
    fix_encoder: bool = field(default=False, metadata={"help": "Train the sparse and colbert heads alone."})
    sentence_pooling_method: Literal["cls", "mean"] = field(
        default="cls", metadata={"help": "Which hidden states become the dense vector."}
    )
    normalize_embeddings: bool = field(
        default=True,
        metadata={
            "aliases": ["--normlized", "--normalized"],
            "help": "L2-normalise dense (and colbert) vectors. Published spelling: --normlized.",
        },
    )
    colbert_dim: int = field(default=-1, metadata={"help": "Width of the colbert vectors; -1: the hidden size."})


@dataclass
class DataArguments:
    """Which rows are trained on and how they become batches."""

    _argument_group_name: ClassVar[str] = "training data"

    train_data: list[str] = field(metadata={"help": "One or more folders of .json/.jsonl files, or such files."})
    knowledge_distillation: bool = field(
        default=False, metadata={"help": "Use pos_scores and neg_scores of the rows as the teacher."}
    )
    cache_path: str | None = field(default=None, metadata={"help": "Where the prepared rows are kept."})
    train_group_size: int = field(default=8, metadata={"help": "Passages a query: 1 positive, the rest negatives."})
    query_max_len: int = field(default=32, metadata={"help": "Tokens of a query; longer ones are cut."})
    passage_max_len: int = field(default=128, metadata={"help": "Tokens of a passage or neg_q; longer ones are cut."})
    max_example_num_per_dataset: int | None = field(
        default=None, metadata={"help": "Sample at most this many rows of each file."}
    )
    query_instruction_for_retrieval: str | None = field(default=None, metadata={"help": "Text put before queries."})
    passage_instruction_for_retrieval: str | None = field(default=None, metadata={"help": "Text put before passages."})
    same_task_within_batch: bool = field(default=False, metadata={"help": "Draw each batch from one file."})
    shuffle_ratio: float = field(
        default=0.0,
        metadata={"help": "Chance that a passage of over 100 characters is cut into 3 chunks that are shuffled."},
    )
    small_threshold: int = field(
        default=0, metadata={"help": "Files of fewer rows than this are merged, folder by folder."}
    )
    drop_threshold: int = field(default=0, metadata={"help": "A merged set of fewer rows than this is dropped."})
    batch_size_by_length: bool = field(
        default=False,
        metadata={
            "help": "For files named …len-0-500.jsonl to …len-7000-inf.jsonl and group size 8 or 1: take the batch "
            "size from upstream's table for 80 GB cards. Upstream did this silently; here only when asked."
        },
    )
    refresh_negatives_every_n_epochs: int = field(
        default=0, metadata={"help": "Mine negatives again with the current weights every N epochs (ANCE); 0: never."}
    )
    refresh_corpus: list[str] = field(
        default_factory=list,
        metadata={"help": "Where they come from: JSON lines with text; default: the passages of the training rows."},
    )
    refresh_range_for_sampling: str = field(
        default="10-210", metadata={"help": "Which ranks, as in mining: A-B are places A+1 to B of the search."}
    )
    refresh_relative_margin: float | None = field(
        default=None, metadata={"help": "Leave out what scores above the positive's score less this share of it."}
    )


@dataclass
class LossArguments:
    """What is minimised."""

    _argument_group_name: ClassVar[str] = "objective"

    penalty_weight: float = field(
        default=0.1,
        metadata={"help": "λ of the contrastive learning penalty: loss × (1 − λ) + λ × penalty. 0 switches it off."},
    )
    temperature: float = field(default=0.02, metadata={"help": "τ; 1 when embeddings are not normalised."})
    negatives_cross_device: bool = field(
        default=False, metadata={"help": "Passages of all processes serve as in-batch negatives."}
    )
    unified_finetuning: bool = field(
        default=False, metadata={"help": "Train dense, sparse and colbert representations together."}
    )
    use_self_distill: bool = field(
        default=False, metadata={"help": "With unified fine-tuning: their sum teaches each of the three."}
    )
    self_distill_start_step: int = field(
        default=-1, metadata={"help": "Forward passes (not optimiser steps) after which self-distillation counts."}
    )


@dataclass
class EngineArguments:
    """How the encoder is computed; the loss does not depend on it."""

    _argument_group_name: ClassVar[str] = "engine"

    engine: Literal["packed", "padded"] = field(
        default="packed", metadata={"help": "packed computes no padding; padded is the plain reference path."}
    )
    slab_tokens: int = field(
        default=2048, metadata={"help": "Packed engine: at most this many tokens at a time; 0: the batch as one."}
    )
    grad_cache: bool = field(
        default=False,
        metadata={
            "help": "Gradient caching: keep one slab's activations at a time and compute each slab twice, so that "
            "memory does not grow with the batch (same gradients)."
        },
    )
    enable_sub_batch: bool = field(
        default=True, metadata={"help": "Padded engine: encode in slices chosen by length, as published."}
    )


@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """Hugging Face's training arguments; see their documentation for the rest.

    Changed defaults: rows keep all their columns, a non-finite loss stops the run instead of being averaged away, and
    DDP does not search for unused parameters.
    """

    _argument_group_name: ClassVar[str] = "Hugging Face TrainingArguments"

    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept False: the collator needs every key."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept False: a non-finite loss stops the run."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every trained parameter gets a gradient at each step, so there is nothing to find."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Accepted from older scripts: a run without --resume_from_checkpoint starts afresh."},
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the steps for a linear warmup (older spelling of a warmup_steps < 1)."},
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps:
                raise UsageError("--warmup_ratio and --warmup_steps both say how long to warm up: give one of them")
            self.warmup_steps = self.warmup_ratio
        if self.fp16 and self.bf16:
            raise UsageError("--fp16 and --bf16 exclude each other: give one of them")
        # Without any accelerator say so to the Trainer: it refuses bf16 otherwise.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.fp16 and self.use_cpu:
            # GradScaler and half-precision kernels need a GPU; published command lines say --fp16 everywhere.
            self.fp16 = False
            self.bf16 = cpu_has_bf16()
            logger.warning("--fp16 needs a GPU: going on in %s", "bf16" if self.bf16 else "fp32")
        elif self.bf16 and self.use_cpu and not cpu_has_bf16():
            logger.warning(
                "--bf16: this processor has no bf16 instructions: the numbers are bf16's, the speed is less than fp32's"
            )
        super().__post_init__()
        for name in self.report_to or []:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise UsageError(f"--report_to {name}: expected none, all or one of {known}")
