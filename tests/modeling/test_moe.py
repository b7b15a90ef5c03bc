"""The expert layer against loops in float64, its router's gradients, its tape, its settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from FlagEmbedding.modeling.backbone import load_backbone, moe_layers
from FlagEmbedding.modeling.moe import MoEConfig, MoELinear, record_routing, token_mask
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

CHOICES = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3), (5, 1)]
WIDTHS = [(6, 10), (10, 6)]  # as in intermediate, as in output


def loops(x: Tensor, layer: MoELinear, per_token: int) -> Tensor:
    """The published forward, token by token and expert by expert."""
    rows = []
    for token in x:
        logits = [(gate * token).sum() for gate in layer.gate.weight]
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:per_token]
        total = sum(torch.exp(logits[e]) for e in chosen)
        row = 0
        for e in chosen:
            expert = layer.experts[e]
            output = torch.stack([(w * token).sum() for w in expert.weight]) + expert.bias
            row = row + torch.exp(logits[e]) / total * output
        rows.append(row)
    return torch.stack(rows)


def make(experts: int, per_token: int, widths=(6, 10), seed: int = 0, **settings) -> MoELinear:
    """A float64 layer whose experts differ."""
    torch.manual_seed(seed)
    config = MoEConfig(moe="intermediate", num_experts=experts, num_experts_per_tok=per_token, **settings)
    layer = MoELinear.from_linear(nn.Linear(*widths), config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return layer


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} took no part in the backward: DDP would wait for it"
        found[name] = parameter.grad.clone()
    return found


@pytest.mark.parametrize(("experts", "per_token"), CHOICES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_forward_and_gradients_equal_the_loops(experts: int, per_token: int, widths: tuple[int, int]) -> None:
    layer = make(experts, per_token, widths)
    x = torch.randn(3, 7, widths[0], dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 7, widths[1], dtype=torch.float64)

    y = layer(x)
    (y * direction).sum().backward()
    ours, ours_x = gradients(layer), x.grad.clone()

    layer.zero_grad()
    x.grad = None
    expected = loops(x.reshape(-1, widths[0]), layer, per_token).reshape(y.shape)
    (expected * direction).sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours_x, x.grad, rtol=0, atol=1e-9)
    for name, parameter in layer.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=1e-9)
    assert (ours["gate.weight"].abs().max() > 1e-3) == (per_token > 1)

    single = layer.float()(x.detach().float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("experts", "per_token"), [(2, 1), (3, 2), (3, 3)])
def test_straight_through_has_the_gradient_of_the_full_softmax(experts: int, per_token: int) -> None:
    layer = make(experts, per_token, router_gradient="straight_through")
    x = torch.randn(9, 6, dtype=torch.float64)
    direction = torch.randn(9, 10, dtype=torch.float64)
    (layer(x) * direction).sum().backward()

    # By hand: dL/dlogit_j = sum over chosen k of <direction, expert_k(x)> p_k (1[j = k] - p_j).
    expected = torch.zeros_like(layer.gate.weight)
    with torch.no_grad():
        for token, pull in zip(x, direction, strict=True):
            logits = [float((gate * token).sum()) for gate in layer.gate.weight]
            total = sum(math.exp(value) for value in logits)
            p = [math.exp(value) / total for value in logits]
            for k in sorted(range(experts), key=lambda e: -logits[e])[:per_token]:
                gain = float((layer.experts[k](token) * pull).sum())
                for j in range(experts):
                    expected[j] += gain * p[k] * ((j == k) - p[j]) * token
    torch.testing.assert_close(layer.gate.weight.grad, expected, rtol=0, atol=1e-9)
    assert layer.gate.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("experts", "per_token"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_straight_through_changes_no_bit_of_the_forward(experts: int, per_token: int, half: torch.dtype | None) -> None:
    plain = make(experts, per_token).float().train()
    learning = make(experts, per_token, router_gradient="straight_through").float().train()
    learning.load_state_dict(plain.state_dict())
    x = torch.randn(50, 6)
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        published, straight = plain(x), learning(x)
    assert straight.requires_grad
    assert torch.equal(published, straight)
    with torch.no_grad():
        assert torch.equal(plain.route(x).weights, learning.route(x).weights)


def test_router_gradient_with_one_expert_a_token() -> None:
    """Published: exactly zero, yet there (weight decay acts on it); straight-through: not zero."""
    x = torch.randn(20, 6, dtype=torch.float64)
    for gradient, moves in (("none", False), ("straight_through", True)):
        layer = make(3, 1, router_gradient=gradient)
        layer(x).square().sum().backward()
        largest = float(layer.gate.weight.grad.abs().max())
        assert (largest > 1e-3) if moves else (largest == 0.0)


def test_frozen_gate_gets_no_gradient() -> None:
    for gradient in ("none", "straight_through"):
        layer = make(2, 1, router_gradient=gradient)
        layer.gate.requires_grad_(False)
        layer(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
        assert layer.gate.weight.grad is None
        assert layer.experts[0].weight.grad is not None


@pytest.mark.parametrize("per_token", [1, 2])
def test_expert_without_tokens(per_token: int) -> None:
    layer = make(3, per_token)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[2.0] * 6, [1.0] * 6, [-3.0] * 6]))
    x = torch.rand(8, 6, dtype=torch.float64) + 0.1  # positive: expert 2 is never among the best two
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, loops(x, layer, per_token), rtol=0, atol=1e-9)
    found = gradients(layer)
    assert float(found["experts.2.weight"].abs().max()) == 0.0
    assert float(found["experts.0.weight"].abs().max()) > 1.0


def test_no_tokens_at_all() -> None:
    layer = make(2, 1)
    y = layer(torch.empty(0, 6, dtype=torch.float64))
    assert y.shape == (0, 10)
    y.sum().backward()
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients(layer).values())


@pytest.mark.parametrize("kind", ["tiny_model_dir", "tiny_roberta_dir", "tiny_bert_dir"])
@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (2, 1), (3, 2)])
def test_identical_experts_equal_the_dense_layer(
    kind: str, place: str, experts: int, per_token: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    dense = load_backbone(folder)
    config = MoEConfig(moe=place, num_experts=experts, num_experts_per_tok=per_token)
    experts_model = load_backbone(folder, moe=config)
    assert len(moe_layers(experts_model)) == dense.config.num_hidden_layers
    ids = torch.randint(6, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        got = experts_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


def test_router_is_precise_under_autocast_and_in_half() -> None:
    layer = make(3, 2, router_gradient="straight_through").float()
    x = torch.randn(40, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = layer.route(x)
        layer(x).square().sum().backward()
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x @ layer.gate.weight.T, rtol=1e-6, atol=1e-6)
    rough = layer.gate.weight.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(rough, layer.gate.weight.grad, rtol=0.1, atol=0.3)

    halved = layer.to(torch.bfloat16)
    y = halved(x.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    assert halved.route(x.detach().bfloat16()).logits.dtype == torch.float32
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in halved.parameters())


def test_jitter_only_while_training() -> None:
    layer = make(4, 1, router_jitter=0.9)
    plain = make(4, 1)
    x = torch.randn(200, 6, dtype=torch.float64)
    plain_choice = plain.route(x).experts
    assert torch.equal(layer.eval().route(x).experts, plain_choice)
    assert torch.equal(layer(x), plain(x))
    torch.manual_seed(3)
    noisy = layer.train().route(x)
    assert 0.02 < float((noisy.experts != plain_choice).double().mean()) < 0.9
    torch.manual_seed(3)
    assert torch.equal(layer.route(x).logits, noisy.logits)


def test_jitter_is_uniform_around_one() -> None:
    layer = make(6, 1, router_jitter=0.4)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(6))
    noise = layer.train().route(torch.ones(5000, 6, dtype=torch.float64)).logits
    assert 0.6 <= float(noise.min()) < 0.601 and 1.399 < float(noise.max()) <= 1.4
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)


class TwoLayers(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.first, self.second = make(3, 1, (6, 6), seed=1), make(3, 2, (6, 6), seed=2)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def test_tape_holds_every_call_with_gradients_also_under_checkpointing() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    found = {}
    for recompute in (False, True):
        model = TwoLayers(recompute)
        with record_routing(model) as tape:
            with token_mask(model, mask):
                y = model(x)
            model(x[:1])
        loss = y.sum() + sum(call.logits.square().sum() for calls in tape.layers for call in calls)
        loss.backward()
        model(x)  # after the block: not recorded
        assert [[call.logits.shape for call in calls] for calls in tape.layers] == [[(8, 3), (5, 3)]] * 2
        assert [calls[0].experts.shape for calls in tape.layers] == [(8, 1), (8, 2)]
        torch.testing.assert_close(tape.layers[0][0].logits, x[mask] @ model.first.gate.weight.T)
        found[recompute] = gradients(model)
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)
    assert float(found[True]["first.gate.weight"].abs().max()) > 1e-3


def test_tape_of_a_dense_model_is_empty(tiny_model_dir: Path) -> None:
    with record_routing(load_backbone(tiny_model_dir)) as tape:
        pass
    assert tape.layers == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": "foo"}, "moe must be intermediate, output or left out, got 'foo'"),
        ({"only_train": "foo"}, "only_train must be intermediate, output or left out, got 'foo'"),
        ({"moe": "output", "num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than"),
        ({"moe": "output", "only_train": "intermediate"}, "would leave every expert frozen"),
        ({"num_experts": 2}, "num_experts 2 has no effect without --moe"),
        ({"moe": "output", "num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"moe": "output", "num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, got 0"),
        ({"moe": "output", "router_gradient": "foo"}, "router_gradient must be none or straight_through, got 'foo'"),
        ({"moe": "output", "router_jitter": 1.0}, r"router_jitter must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MoEConfig(**settings)
    assert "\n" not in str(caught.value)
