"""Scores and losses are computed in float32 at least, whatever precision the encoder runs in.

Divided by a temperature of 0.02 a cosine reaches 50, where neighboring bfloat16 numbers are 0.25 apart: in half
precision the softmax over in-batch passages would see mostly rounding. Next to the encoder these products cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_HALF = (torch.float16, torch.bfloat16)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside autocast, its half-precision tensors made float32; float64 stays float64."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device_type=device, enabled=False):
            return function(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    return run


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
