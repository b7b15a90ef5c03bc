"""Experts in blocks of rows: the same numbers and gradients as expert by expert, whatever the counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from FlagEmbedding.modeling import expert_blocks
from FlagEmbedding.modeling.expert_blocks import Blocks, stacked, through_blocks

pytestmark = pytest.mark.numeric

EXPERTS = 3
COUNTS = {
    "all": [5, 1, 9],
    "one starved": [0, 11, 4],
    "one takes all": [0, 0, 15],
    "exactly blocks": [4, 8, 4],
    "one row": [0, 1, 0],
    "none": [0, 0, 0],
}


def by_loop(experts: list[nn.Linear], x: Tensor, chosen: Tensor) -> Tensor:
    rows = [experts[int(expert)](row) for row, expert in zip(x, chosen, strict=True)]
    return torch.stack(rows) if rows else experts[0](x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_and_gradients_equal_expert_by_expert(
    counts: list[int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_blocks, "SMALLEST", 4)
    torch.manual_seed(0)
    experts = [nn.Linear(6, 5, bias=bias, dtype=torch.float64) for _ in range(EXPERTS)]
    chosen = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    chosen = chosen[torch.randperm(len(chosen))]
    found = []
    gradient = torch.randn(len(chosen), 5, dtype=torch.float64)
    x = torch.randn(len(chosen), 6, dtype=torch.float64, requires_grad=True)
    parameters = [p for expert in experts for p in expert.parameters()]
    for way in (lambda: through_blocks(experts, x, chosen, torch.float64), lambda: by_loop(experts, x, chosen)):
        y = way()
        gradients = torch.autograd.grad(y, [x, *parameters], gradient, allow_unused=True, materialize_grads=True)
        found.append([y.detach(), *gradients])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_the_host_knows_the_number_of_blocks_and_each_is_of_one_expert() -> None:
    for rows in (1, 127, 128, 129, 5000, 40_000):
        chosen = torch.randint(EXPERTS, (rows,), generator=torch.Generator().manual_seed(rows))
        blocks = Blocks(chosen, EXPERTS)
        assert blocks.size in (128, 256, 512, 1024) and blocks.count == rows // blocks.size + EXPERTS
        assert torch.equal(blocks.expert[blocks.rows // blocks.size], chosen)
        assert torch.equal(blocks.slots[blocks.rows], torch.arange(rows))
        assert len(blocks.rows.unique()) == rows


def test_joined_weights_are_those_and_so_are_their_gradients() -> None:
    parts = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    whole = stacked(parts, torch.bfloat16)
    assert torch.equal(whole, torch.stack([part.detach() for part in parts]).bfloat16())
    gradient = torch.randn(2, 3, 4).bfloat16()
    whole.backward(gradient)
    for part, own in zip(parts, gradient, strict=True):
        assert part.grad is not None and part.grad.dtype == torch.float32 and torch.equal(part.grad, own.float())
