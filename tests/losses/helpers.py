"""One comparison for all losses: value and gradient of the package against the loops, in float64 and in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PRECISIONS = ((torch.float64, 1e-9), (torch.float32, 1e-5))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def as_matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])


def check(ours: Callable[..., Tensor], loops: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Both functions get the same float64 inputs; a matrix result is weighted so that every entry has its own gradient.

    ``ours`` must agree to 1e-9 in float64 and to 1e-5 in float32, value and every gradient, relative to the largest
    number of the tensor where that is above 1. Some gradient must not be zero.
    """

    def value_and_gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        value = function(*leaves)
        weights = torch.linspace(1, 2, max(1, value.numel()), dtype=value.dtype).reshape(value.shape)
        gradients = torch.autograd.grad((value * weights).sum() if value.dim() else value, leaves)
        return value.detach().double(), [g.double() for g in gradients]

    expected, expected_gradients = value_and_gradients(loops, torch.float64)
    for dtype, tolerance in PRECISIONS:
        value, gradients = value_and_gradients(ours, dtype)
        for got, want in zip([value, *gradients], [expected, *expected_gradients], strict=True):
            scale = max(1.0, float(want.abs().max()))
            assert got.shape == want.shape
            assert float((got - want).abs().max()) <= tolerance * scale, (dtype, float((got - want).abs().max()), scale)
    assert max(float(g.abs().max()) for g in expected_gradients) > 1e-3
