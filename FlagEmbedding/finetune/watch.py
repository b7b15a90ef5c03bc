"""Stops a run that cannot go on: a loss that is no number, or that says nothing for steps on end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from FlagEmbedding.finetune.resume.loss_window import LossWindow
from FlagEmbedding.utils.errors import UserError

SILENT_STEPS = 10  # so long may a loss be 0, or ln N
# Scores of one query that differ by less, in themselves or as a share of the greatest, are the same but for rounding.
_SAME_SCORES, _SAME_SHARE = 1e-5, 2e-6


@dataclass(frozen=True)
class _Look:
    """Figures of one micro-batch on their way from the device: loss, spread of the scores, greatest score."""

    figures: Tensor
    copied: torch.cuda.Event | None
    candidates: int
    rows: list[str]
    step: int


class LossWatch:
    """Looks at every micro-batch; on a device one late, so that nothing waits for the step that is being computed.

    Args:
        window: counts the micro-batches in a row that told nothing, and travels with checkpoints.
        accumulation: micro-batches per step.
    """

    def __init__(self, window: LossWindow, accumulation: int) -> None:
        self._window, self._accumulation = window, accumulation
        self._late: _Look | None = None

    def look(self, loss: Tensor, scores: Tensor, rows: list[str], step: int) -> None:
        """Take note of a micro-batch: ``loss`` scalar, ``scores`` ``[B, M]``, ``rows`` as ``file:line``.

        Raises:
            UserError: this one, or on a device the one before, shows that the run cannot go on.
        """
        self.settle()
        spread = (scores.amax(dim=1) - scores.amin(dim=1)).amax()
        figures = torch.stack([loss.float(), spread.float(), scores.abs().amax().float()])
        copied = None
        if figures.device.type == "cuda":
            figures, copied = figures.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._late = _Look(figures, copied, scores.shape[1], rows, step)
        if copied is None:
            self.settle()

    def settle(self) -> None:
        """Judge what was noted and not yet judged."""
        late, self._late = self._late, None
        if late is None:
            return
        if late.copied is not None:
            late.copied.synchronize()
        value, apart, greatest = late.figures.tolist()
        rows = _shown(late.rows)
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {late.step}, in the batch of {rows}: look at these rows, lower "
                "--learning_rate, or train in bf16 or fp32 instead of fp16"
            )
        flat = late.candidates > 1 and apart <= max(_SAME_SCORES, _SAME_SHARE * greatest)
        self._window.saw(zero=value == 0.0, flat=flat)
        enough = SILENT_STEPS * self._accumulation
        if self._window.flat_micro_batches >= enough:
            raise UserError(
                f"the contrastive loss has been ln {late.candidates} for {SILENT_STEPS} steps, every passage with the "
                f"same score, last in the batch of {rows}: the vectors do not depend on the texts; look at the "
                "tokenizer, the pooling and the weights of the model"
            )
        if self._window.zero_micro_batches >= enough:
            raise UserError(
                f"the loss has been exactly 0 for {SILENT_STEPS} steps, last in the batch of {rows}: nothing is left "
                "to learn from these rows; raise --train_group_size, or use harder negatives"
            )


def _shown(rows: list[str]) -> str:
    shown = ", ".join(rows[:8])
    return shown + (f" and {len(rows) - 8} more" if len(rows) > 8 else "") if rows else "unknown rows"
