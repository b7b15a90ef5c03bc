"""Three optimizer steps of a run, for what they cost: time of a step, and what lies in memory for it.

They are real steps of the real Trainer on the run's first batches; what they write would go to ``output_dir``, which
the caller gives as an empty folder.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from FlagEmbedding.finetune.arguments import RetrieverTrainingArguments
from FlagEmbedding.finetune.trainer import BiEncoderTrainer

STEPS = 3
# What a probe leaves out: files, evaluations, whoever is told of the run.
_LEFT_OUT: dict[str, Any] = {
    "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": [],
    "load_best_model_at_end": False, "disable_tqdm": True, "push_to_hub": False, "resume_from_checkpoint": None,
    "logging_first_step": False,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one process.

    Attributes:
        seconds: a step after the first, on average.
        weights, gradients, optimizer: bytes.
        activations: the most bytes kept for the backward pass of one micro-batch.
        peak: the most bytes that a device had given out; None on a CPU.
        beside: bytes of the averaged weights (``--ema_decay``) and of the guide (``--guide_model``).
    """

    seconds: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int | None
    beside: int = 0

    @property
    def memory(self) -> int:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.beside


def left_out(training: RetrieverTrainingArguments) -> None:
    """Change a copy of a run's arguments into those of its probe."""
    for name, value in _LEFT_OUT.items():
        setattr(training, name, value)


class ProbeTrainer(BiEncoderTrainer):
    """``BiEncoderTrainer`` for :data:`STEPS` steps that are looked at; the first micro-batch for its memory."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clock = _Clock()
        self.kept: KeptBytes | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(self.clock)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The first one tells what autograd keeps."""
        if self.kept is not None:
            return super().training_step(model, inputs, *args, **kwargs)
        self.kept = KeptBytes({p.untyped_storage().data_ptr() for p in model.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(self.kept.pack, self.kept.unpack):
            return super().training_step(model, inputs, *args, **kwargs)

    def cost(self) -> Cost:
        """Train, and say what it took. Raises ``UserError``, as the run would."""
        share = self.args.world_size if self.args.fsdp or self.args.deepspeed else 1
        parameters = list(self.bare_model.parameters())
        weights = sum(p.numel() * p.element_size() for p in parameters)
        gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        self.args.max_steps = STEPS  # only now: the fingerprint has the run's
        self.train()
        self.watch.settle()
        states: Any = getattr(self.optimizer, "state", {})
        optimizer = sum(_size(value) for own in states.values() for value in own.values() if torch.is_tensor(value))
        ends, guide = self.clock.ends, self.bare_model.guide
        cuda = torch.cuda.is_available() and not self.args.use_cpu
        return Cost(
            seconds=(ends[-1] - ends[0]) / (len(ends) - 1),
            weights=weights // share,
            gradients=gradients // share,
            optimizer=optimizer,
            activations=self.kept.most if self.kept else 0,
            peak=torch.cuda.max_memory_allocated() if cuda else None,
            beside=(0 if self.average is None else self.average.held) + (0 if guide is None else guide.held),
        )


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())


class KeptBytes:
    """Bytes of the storages that a backward pass waits for, now and at most; ``known`` ones are the weights."""

    def __init__(self, known: set[int]) -> None:
        self.most, self.now, self._known = 0, 0, known
        self._holders: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor.detach())

    @staticmethod
    def unpack(held: _Held) -> Tensor:
        return held.tensor

    def add(self, tensor: Tensor, change: int) -> None:
        """One more, or one fewer, that holds ``tensor``'s storage."""
        storage = tensor.untyped_storage()
        place, before = storage.data_ptr(), self._holders[storage.data_ptr()]
        self._holders[place] = before + change
        if place not in self._known and 0 in (before, before + change):
            self.now += change * storage.nbytes()
            self.most = max(self.most, self.now)


class _Held:
    """A saved tensor; when autograd lets it go, so does the count."""

    def __init__(self, kept: KeptBytes, tensor: Tensor) -> None:
        self.tensor, self._kept = tensor, kept
        kept.add(tensor, 1)

    def __del__(self) -> None:
        self._kept.add(self.tensor, -1)


def _size(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())
