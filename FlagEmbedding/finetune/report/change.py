"""What a run changed: how far weights and vectors moved from the base, and margins of sampled rows before and after.

The base is made once more when the run has ended, with the experts that it began with; then the saved checkpoint's
tensors are put into it. So this looks at what was saved, and takes the memory of the weights once (of those that train
twice) at the end, not while training.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.report.sampled import Sampled, sample
from FlagEmbedding.finetune.trainer import BiEncoderTrainer
from FlagEmbedding.modeling.backbone import load_trained_state
from FlagEmbedding.utils.errors import UserError
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.randomness import untouched_randomness

logger = get_logger(__name__)

# What the parts are called, and how their parameters' names look; the first that fits.
_PARTS = {
    "routers": r"\.gate\.",
    "heads": r"^(sparse|colbert)_linear\.",
    "layers after pooling": r"^projections\.",
    "experts": r"\.experts\.",
    "norms": r"(?i)norm|layer_norm|\bln_?\d?\.",
    "embeddings": r"(?i)embed|\bwte\.|\bwpe\.|\bshared\.",
    "attention": r"(?i)att(e)?n",
    "feed-forward": r"(?i)intermediate\.dense|output\.dense|mlp|ffn|feed_forward|\bfc\d?\.",
}


@dataclass(frozen=True)
class Part:
    """Parameters of one kind: how many train, and ‖after − before‖ / ‖before‖ (Euclidean norms over all of them)."""

    name: str
    parameters: int
    moved: float


@dataclass(frozen=True)
class Change:
    """Base against checkpoint.

    Attributes:
        parts: what was trained.
        before, after: the same rows under both.
    """

    parts: list[Part]
    before: Sampled
    after: Sampled

    def cosine(self, role: str) -> float:
        """Mean cosine of the same texts before and after; ``role``: ``queries`` or ``passages``."""
        old, new = (getattr(each, role).astype(np.float64) for each in (self.before, self.after))
        norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
        return float(((old * new).sum(axis=-1) / norms).mean())


def measure_change(trainer: BiEncoderTrainer, arguments: Arguments) -> Change | None:
    """Compare the base with what was saved to ``output_dir``; None, in one line, where that cannot be done.

    No random stream of training is touched. For the main process alone.
    """
    try:
        with untouched_randomness():
            return _measure(trainer, arguments)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        logger.warning("the report does not say how far the model moved: %s", " ".join(str(error).split()))
        return None


def _measure(trainer: BiEncoderTrainer, arguments: Arguments) -> Change:
    set_seed(arguments.training.seed)  # as when the run began: new gates are drawn from it
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the run has said it all when it began
    try:
        model = BiEncoder(arguments.model, arguments.experts, arguments.objective, arguments.engine)
    finally:
        logging.disable(level)
    model.to(arguments.training.device)
    adapted = {f"{name}.weight" for name, each in trainer.bare_model.named_modules() if hasattr(each, "lora_A")}
    if adapted:  # the base has no adapters: what these move, and what trains beside them
        beside = {n for n, p in trainer.bare_model.named_parameters() if p.requires_grad and "lora_" not in n}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in adapted | beside)
    old = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    before = sample(model, trainer.batch_sampler, trainer.data_collator)  # type: ignore[arg-type]
    load_trained_state(model, Path(str(arguments.training.output_dir)))
    new = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return Change(parts(old, new), before, sample(model, trainer.batch_sampler, trainer.data_collator))  # type: ignore[arg-type]


def parts(old: dict[str, Tensor], new: dict[str, Tensor]) -> list[Part]:
    """How far the parameters of each part moved; both hold the same names."""
    sums: dict[str, list[float]] = {}
    for name, value in old.items():
        part = next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "other")
        moved, norm = (new[name].double() - value.double()).square().sum(), value.double().square().sum()
        own = sums.setdefault(part, [0, 0.0, 0.0])
        sums[part] = [own[0] + value.numel(), own[1] + float(moved), own[2] + float(norm)]
    order = [*_PARTS, "other"]
    return [
        Part(part, int(count), (moved / norm) ** 0.5 if norm else float(moved > 0))
        for part, (count, moved, norm) in sorted(sums.items(), key=lambda item: order.index(item[0]))
    ]
