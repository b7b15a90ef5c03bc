"""SIGTERM and Ctrl-C end a run at the next step boundary, with a checkpoint from which it goes on as if never stopped.

Spot machines and SLURM say SIGTERM some time before they kill. The step is finished, so that no row counts twice; with
several processes all agree after every step, so that they save at the same one whoever was told.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from FlagEmbedding.utils.distributed import is_initialized, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun hands on what its children also get themselves (Ctrl-C, scancel): so soon after, it is the same signal.
_SAME_SIGNAL = 1.0  # seconds
_WORKER_STAYS = 60.0  # seconds


class StopAtStep(TrainerCallback):
    """Ends training at the end of the step in which a signal came.

    Attributes:
        received: number of the signal, on every process once they have agreed; 0: none came.
        agreed: all processes end at this step.
    """

    def __init__(self) -> None:
        self.received, self.agreed = 0, False
        self._since = 0.0
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is noted; another one ends the process at once. Elsewhere both act as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may say what a signal does
            return
        if is_initialized() and world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # of its own: nothing waits for a device
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since >= _SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask all processes whether one of them was told to stop."""
        told = torch.tensor(self.received)
        if self._group is not None:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        if not told or state.global_step >= state.max_steps:  # the last step ends the run by itself
            return
        self.received, self.agreed = int(told), True
        control.should_training_stop = True
        # After the last step of an epoch its log line may be due, which belongs into the checkpoint.
        control.should_save = control.should_save or not _ends_epoch(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer calls this also where training stops in the middle of an epoch, which has not ended then."""
        if self.agreed:
            control.should_save = _ends_epoch(state)
            control.should_log = control.should_log and _ends_epoch(state)


def _ends_epoch(state: TrainerState) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


def outlive_signals() -> None:
    """For a dataloader's worker: a signal to the whole group must not take it away from a step that is being ended.

    It goes when its parent is gone, or tells it to; where that cannot reach it, a minute after a SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_later(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _WORKER_STAYS)

    signal.signal(signal.SIGTERM, leave_later)
