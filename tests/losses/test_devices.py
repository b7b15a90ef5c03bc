"""The same numbers on every device, and under autocast: half precision around a loss must not reach into it."""

from __future__ import annotations

import pytest
import torch
from losses.helpers import random, unit
from losses.test_contrastive import SKIP, padded, sparse_side
from torch import Tensor

from FlagEmbedding.losses.contrastive import colbert_scores, dense_scores, info_nce, sparse_scores
from FlagEmbedding.losses.distillation import knowledge_distillation, self_distillation
from FlagEmbedding.losses.penalty import clp_penalty
from FlagEmbedding.losses.router import load_balance_loss, routing_statistics, z_loss

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def everything(device: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every function of the room once, then the gradient of each input, on the CPU afterwards."""
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        results, inputs = forward(device, dtype)
    values = {name: value.detach() for name, value in results.items()}
    for name, leaves in inputs.items():
        for index, gradient in enumerate(torch.autograd.grad(results[name].sum(), leaves, retain_graph=True)):
            values[f"{name} gradient {index}"] = gradient
    return {name: value.cpu() for name, value in values.items()}


def forward(device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The results by name, and what each depends on."""
    results: dict[str, Tensor] = {}
    inputs: dict[str, tuple[Tensor, ...]] = {}

    def floats(value: Tensor) -> Tensor:
        return value.to(device, dtype).requires_grad_()

    def keep(name: str, value: Tensor, *leaves: Tensor) -> Tensor:
        results[name], inputs[name] = value, leaves
        return value

    q, p = floats(unit(2, 8, seed=1)), floats(unit(6, 8, seed=2))
    scores = keep("dense", dense_scores(q, p, 0.05), q, p)
    keep("info_nce", info_nce(scores, 3), q, p)
    targets = torch.softmax(random(2, 3, seed=3), dim=-1).to(device, dtype)
    keep("knowledge", knowledge_distillation(scores, targets, 3), q, p)
    keep("self", self_distillation(scores, random(2, 6, seed=4).to(device, dtype)), q, p)
    keep("penalty", clp_penalty(p, q, torch.tensor([1, 4], device=device)), q, p)

    q_lengths, p_lengths = [4, 6], [7, 5, 9, 3, 8, 6]
    (q_ids, q_weights), (p_ids, p_weights) = sparse_side(q_lengths, 1), sparse_side(p_lengths, 2)
    a, b = floats(q_weights.relu()), floats(p_weights.relu())
    sparse = sparse_scores(q_ids.to(device), a, q_lengths, p_ids.to(device), b, p_lengths, SKIP, 0.05)
    keep("sparse", sparse, a, b)

    (q_vectors, mask), (p_vectors, _) = padded(q_lengths, 4, 5), padded(p_lengths, 4, 6)
    c, d = floats(q_vectors), floats(p_vectors)
    keep("colbert", colbert_scores(c, mask.to(device), d, 0.05), c, d)

    logits = floats(random(9, 3, seed=7))
    chosen = logits.detach().topk(2, dim=-1).indices
    keep("balance", load_balance_loss(logits, chosen), logits)
    keep("z", z_loss(logits), logits)
    results |= routing_statistics(logits, chosen)._asdict()
    return results, inputs


@pytest.mark.parametrize("device", DEVICES)
def test_every_function_on_every_device(device: str) -> None:
    expected, got = everything("cpu", torch.float64), everything(device, torch.float64)
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device: str, half: torch.dtype) -> None:
    """At τ = 0.02 neighboring bfloat16 scores are 0.25 apart; under autocast ours are those of float32."""
    plain = everything(device, torch.float32)
    under = everything(device, torch.float32, autocast=half)
    for name, value in plain.items():
        assert under[name].dtype == value.dtype and torch.equal(under[name], value), name


def test_tensors_given_by_name_are_made_float32_too() -> None:
    q, p = unit(2, 8, seed=1).bfloat16(), unit(6, 8, seed=2).bfloat16()
    named, placed = dense_scores(q_reps=q, p_reps=p, temperature=0.02), dense_scores(q, p, 0.02)
    assert named.dtype == torch.float32 and torch.equal(named, placed)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_float32(half: torch.dtype) -> None:
    for name, value in everything("cpu", half).items():
        if name == "tokens_per_expert":
            assert value.dtype == torch.int64
        else:
            assert value.dtype == (half if "gradient" in name else torch.float32), name
            assert torch.isfinite(value).all()
