"""Exponential moving average of the trained weights (``--ema_decay``): what is evaluated on dev and kept at the end.

The average begins with the weights after the first step, as ``torch.optim.swa_utils.AveragedModel`` does, and takes
every optimizer step in: ``a ← d·a + (1 − d)·w``. Frozen weights have none. The model goes on training with its own
weights; a checkpoint holds those, and beside them the average (``ema.safetensors``), so that a run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from FlagEmbedding.modeling.backbone import load_trained_state
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import follow_umask
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

EMA_FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """The average of ``model``'s trained weights.

    Args:
        model: the bare model, before or after it was put on its device.
        decay: d, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._averages: dict[str, Tensor] = {}  # empty until the first step

    @property
    def begun(self) -> bool:
        """False before the first step: the average is the model itself."""
        return bool(self._averages)

    def _trained(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Say what it costs."""
        trained = self._trained()
        count, device = sum(each.numel() for each in trained.values()), next(iter(trained.values())).device
        said = "weights averaged with decay %g: %d parameters, %.2f GB more on %s"
        logger.info(said, self.decay, count, self.held / 1e9, device)

    @property
    def held(self) -> int:
        """Bytes of the average."""
        return sum(each.numel() * each.element_size() for each in self._trained().values())

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take this step's weights in."""
        trained = self._trained()
        if not self.begun:
            self._averages = {name: each.detach().clone() for name, each in trained.items()}
            return
        weights = [each.detach() for each in trained.values()]
        self._update([self._averages[name] for name in trained], weights, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the averaged weights in the model, unless those of the best checkpoint were put there."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._put(self._averages)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        own = {name: each.detach().clone() for name, each in self._trained().items()} if self.begun else {}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        trained = self._trained()
        for name, value in values.items():
            trained[name].copy_(value)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint folder."""
        if self.begun:
            save_file({name: each.cpu().contiguous() for name, each in self._averages.items()}, folder / EMA_FILE)
            follow_umask(folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's average; without one it begins again, with the weights after the next step."""
        if not (folder / EMA_FILE).is_file():
            logger.warning("%s holds no averaged weights (%s): the average begins here", folder, EMA_FILE)
            return
        self._averages = read_average(self.model, folder)


def read_average(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, each on the device of ``model``'s own.

    Raises:
        DataError: they are not those of the parameters that ``model`` trains.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with safe_open(folder / EMA_FILE, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in trained.items()}:
        raise DataError(f"{folder / EMA_FILE} holds other weights than those that are trained: start afresh")
    return {name: value.to(trained[name]) for name, value in found.items()}


@torch.no_grad()
def load_kept(model: nn.Module, folder: Path) -> None:
    """Put what a checkpoint was measured by into ``model``: its weights, averaged where it holds an average."""
    load_trained_state(model, folder)
    if (folder / EMA_FILE).is_file():
        for name, value in read_average(model, folder).items():
            model.get_parameter(name).copy_(value)
