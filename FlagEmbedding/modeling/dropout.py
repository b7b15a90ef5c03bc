"""Dropout at a fraction of its usual price on a CPU.

On processors other than Intel's, torch draws each Bernoulli number by itself (6 ns; a tenth of a training step of an
encoder). Here a mask is 16 random bits an element, compared with a threshold (0.5 ns). The bits come from numpy's
SFC64 generator, seeded by one draw from torch's: ``torch.manual_seed`` decides them, and recomputation under
``torch.utils.checkpoint`` repeats them. Every element is drawn independently. The probability is rounded to a multiple
of 2^-16 (0.1 becomes 0.100006) and the kept values are scaled by the inverse of that very number, so the expectation
is exact. On other devices torch's own dropout is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.modeling import kernels


class MaskSource:
    """Independent keep-or-drop masks for CPU tensors, from one draw of torch's generator.

    Args:
        probability: chance of dropping, in [0, 1).

    Attributes:
        scale: what kept values are multiplied by; 1.0 if nothing is ever dropped.
    """

    def __init__(self, probability: float) -> None:
        dropped, self.scale = kernels.dropout_threshold(probability)
        self._threshold = dropped - kernels.DROPOUT_LEVELS // 2  # bits are read as int16
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
        self._generator = np.random.SFC64(seed)

    def draw(self, *shape: int) -> Tensor:
        """A mask of this shape, int8: 1 keep, 0 drop (torch multiplies by int8 four times as fast as by bool)."""
        count = int(np.prod(shape))
        bits = self._generator.random_raw((count + 3) // 4).view(np.int16)
        keep = np.greater_equal(bits[:count], self._threshold)
        return torch.from_numpy(keep.view(np.int8)).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        source = MaskSource(probability)
        mask = source.draw(*x.shape)
        ctx.scale = source.scale
        ctx.save_for_backward(mask)
        return x.mul(mask).mul_(source.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient.mul(mask).mul_(ctx.scale), None


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """``x`` with each element zeroed with this probability while training, the others scaled up."""
    if not training or probability == 0:
        return x
    if x.device.type != "cpu" or not x.is_floating_point():
        return F.dropout(x, probability)
    return _Dropout.apply(x, probability)  # type: ignore[no-any-return, no-untyped-call]
