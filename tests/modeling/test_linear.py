"""Weights laid out for oneDNN: the same numbers, in fp32 and without gradients alone, never those of before."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from FlagEmbedding.modeling import packed
from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.linear import KEEPS, apply_linear, linear_add, prepack, side_by_side
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.modeling.packed import packed_forward, prepack_weights
from FlagEmbedding.modeling.tokens import TokenBatch

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(
        not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="torch without oneDNN's layout of weights"
    ),
]


def layers(count: int, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(1)
    return [nn.Linear(48, 32, bias=bias) for _ in range(count)]


@pytest.mark.parametrize("bias", [True, False])
def test_several_layers_as_one_product(bias: bool) -> None:
    three, x = layers(3, bias), torch.randn(70, 48)
    expected = torch.cat([nn.functional.linear(x, each.weight, each.bias) for each in three], dim=-1)
    prepack(*three, rows=64)
    with torch.no_grad():
        torch.testing.assert_close(side_by_side(x, *three), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(side_by_side(x[:3], *three), expected[:3], rtol=1e-5, atol=1e-6)
    # With gradients the layers themselves are read.
    side_by_side(x, *three).sum().backward()
    assert all(each.weight.grad is not None for each in three)


def test_frozen_weights_are_kept_joined_until_they_change() -> None:
    """What nothing trains is joined once for all slabs of a run; gradients of what it reads are the same."""
    three, x = layers(3), torch.randn(20, 48, requires_grad=True)
    for each in three:
        each.requires_grad_(False)

    def check() -> None:
        expected = torch.cat([nn.functional.linear(x, each.weight, each.bias) for each in three], dim=-1)
        found = side_by_side(x, *three)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn_like(expected)
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

    check()
    kept = dict(three[0].__dict__["_kept"])
    check()
    assert kept == three[0].__dict__["_kept"], "made once"
    with torch.no_grad():
        three[1].weight.mul_(2)
    check()
    three[2].weight = nn.Parameter(torch.randn(32, 48), requires_grad=False)
    check()


@pytest.mark.parametrize("reason", ["trained", "sharded"])
def test_no_second_copy_of_weights_that_are_trained_or_sharded(reason: str) -> None:
    three, x = layers(3), torch.randn(20, 48)
    for each in three:
        each.requires_grad_(reason == "trained")
        each.__dict__[KEEPS] = reason != "sharded"
    side_by_side(x, *three)
    assert "_kept" not in three[0].__dict__


@pytest.mark.parametrize("kept", ["joined", "laid out"])
def test_a_copy_takes_no_second_copy_of_weights_along(kept: str) -> None:
    three, x = nn.ModuleList(layers(3)).requires_grad_(False), torch.randn(20, 48)
    size = len(pickle.dumps(three))
    if kept == "joined":
        expected = side_by_side(x.requires_grad_(), *three).detach()
    else:
        prepack(*three, rows=64)
        expected = torch.cat([each(x) for each in three], dim=-1)
    assert len(pickle.dumps(three)) < size + 1_000  # a weight has 6,144 bytes
    for other in (copy.deepcopy(three), pickle.loads(pickle.dumps(three))):
        with torch.no_grad():
            torch.testing.assert_close(side_by_side(x, *other), expected, rtol=1e-5, atol=1e-6)


def test_changed_weights_are_never_read_from_the_layout() -> None:
    (layer,), x = layers(1), torch.randn(40, 48)
    prepack(layer, rows=64)
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({"weight": torch.randn(32, 48), "bias": torch.randn(32)}),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(32, 48))),
        lambda: setattr(layer.bias, "data", torch.randn(32)),
    ):
        with torch.no_grad():
            before = apply_linear(layer, x)
            change()
            after = apply_linear(layer, x)
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(linear_add(layer, x, after), expected + after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [None, "intermediate", "output"])
def test_an_encoder_gives_the_same_states(
    tiny_model_dir: Path, place: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "can_compile", lambda _: False)  # else the compiled encoder goes before
    config = MoEConfig(moe=place, num_experts=2) if place else None
    torch.manual_seed(0)
    model = load_backbone(tiny_model_dir, moe=config).to(dtype).eval()
    tokens = TokenBatch.from_lists([torch.randint(4, 90, (n,)).tolist() for n in (40, 33, 33, 17, 9, 9, 2, 1)])
    with torch.inference_mode():
        plain = packed_forward(model, tokens), packed_forward(model, tokens, first_tokens_only=True)
    prepack_weights(model, 2048)
    dense = model.encoder.layer[0].attention.output.dense
    assert ("_prepacked" in dense.__dict__) == (dtype == torch.float32)
    with torch.inference_mode():
        laid_out = packed_forward(model, tokens), packed_forward(model, tokens, first_tokens_only=True)
    for ours, expected in zip(laid_out, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
