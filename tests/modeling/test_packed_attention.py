"""Attention over packed rows, masks for dropout, fused linear layers and sorted experts, each against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from FlagEmbedding.modeling.attention import _fused_groups, _varlen, packed_attention
from FlagEmbedding.modeling.attention_groups import CHUNK_ELEMENTS
from FlagEmbedding.modeling.dropout import MaskSource, dropout
from FlagEmbedding.modeling.feed_forward import Assignment, _by_slices, grouped_product
from FlagEmbedding.modeling.linear import apply_linear, linear, linear_add, linear_gelu
from FlagEmbedding.modeling.moe import MoEConfig, MoELinear
from FlagEmbedding.modeling.slabs import Layout

pytestmark = pytest.mark.numeric

HEADS, WIDTH = 4, 32  # heads of 8, which the compiled kernels leave to the groups; test_kernels.py has theirs
LENGTHS = [9, 9, 7, 3, 3, 3, 1]
CPU = torch.device("cpu")


def by_rows(
    projections: Tensor,
    queries: Tensor | None,
    lengths: list[int] = LENGTHS,
    masks: list[Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Attention written out, one row and one head at a time; ``masks`` are applied to the probabilities."""
    parts = 3 if queries is None else 2
    results = []
    for number, row in enumerate(projections.split(lengths)):
        *asking, key, value = row.chunk(parts, dim=1)
        query = asking[0] if asking else queries[number : number + 1]
        heads = []
        for head in range(HEADS):
            q, k, v = (x[:, head * 8 : head * 8 + 8] for x in (query, key, value))
            p = torch.softmax(q @ k.T / math.sqrt(8), dim=-1)
            if masks is not None:
                p = p * masks[number][head] * scale
            heads.append(p @ v)
        results.append(torch.cat(heads, dim=1))
    return torch.cat(results)


def inputs(first: bool, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    projections = torch.randn(sum(lengths), WIDTH * (2 if first else 3), requires_grad=True)
    return projections, torch.randn(len(lengths), WIDTH, requires_grad=True) if first else None


def check_gradients(found: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    ours = torch.autograd.grad((found * weight).sum(), tensors)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("compute", [packed_attention, _fused_groups])
def test_groups_equal_rows(first: bool, compute) -> None:
    projections, queries = inputs(first)
    layout = Layout(LENGTHS, CPU)
    if compute is packed_attention:
        found = packed_attention(projections, layout, HEADS, queries=queries)
    else:
        found = _fused_groups(projections, layout, HEADS, queries, 0.0)
    tensors = [projections] if queries is None else [projections, queries]
    check_gradients(found, by_rows(projections, queries), tensors, 2e-6)


@pytest.mark.parametrize("first", [False, True])
# The long rows go through one at a time, the short ones as a group.
@pytest.mark.parametrize("lengths", [LENGTHS, [300, 300, 3, 3]])
def test_dropout_drops_what_the_masks_say(first: bool, lengths: list[int]) -> None:
    projections, queries = inputs(first, lengths)
    layout = Layout(lengths, CPU)
    torch.manual_seed(8)
    found = packed_attention(projections, layout, HEADS, queries=queries, dropout=0.3)
    # The same seed gives the same masks; a chunk draws [rows * heads, queries, keys].
    torch.manual_seed(8)
    source = MaskSource(0.3)
    masks: list[Tensor] = []
    for group in layout.groups:
        asking = 1 if first else group.length
        step = max(1, CHUNK_ELEMENTS // (HEADS * asking * group.length))
        for start in range(0, group.count, step):
            rows = min(step, group.count - start)
            masks += source.draw(rows * HEADS, asking, group.length).view(rows, HEADS, asking, -1).unbind(0)
    tensors = [projections] if queries is None else [projections, queries]
    check_gradients(found, by_rows(projections, queries, lengths, masks, source.scale), tensors, 1e-5)


def test_bf16_attention_is_as_near_as_torchs() -> None:
    exact = by_rows(*inputs(False)).detach()
    projections = inputs(False)[0].detach().bfloat16()
    ours = packed_attention(projections, Layout(LENGTHS, CPU), HEADS)
    theirs = by_rows(projections, None)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("first", [False, True])
def test_variable_length_kernel_gets_what_it_asks_for(first: bool) -> None:
    """The GPU kernel cannot run here; torch's own description of it (its fake kernel) checks dtypes and shapes."""
    projections, queries = (None if x is None else x.detach().bfloat16().to("meta") for x in inputs(first))
    layout = Layout(LENGTHS, torch.device("meta"))
    found = _varlen("torch", projections, layout, HEADS, queries, 0.0)
    assert found.shape == (len(LENGTHS) if first else sum(LENGTHS), WIDTH)
    assert layout.cumulative.dtype == layout.row_numbers.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_attention_equals_rows(first: bool, dtype: torch.dtype) -> None:
    projections, queries = inputs(first)
    expected = by_rows(projections, queries)
    on_gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in (projections, queries) if x is not None]
    found = packed_attention(
        on_gpu[0], Layout(LENGTHS, torch.device("cuda")), HEADS, queries=on_gpu[1] if first else None
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(expected)
    tensors = [projections] if queries is None else [projections, queries]
    theirs = torch.autograd.grad((expected * weight).sum(), tensors)
    ours = torch.autograd.grad((found * weight.to(found)).sum(), on_gpu)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float().cpu(), b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_attention_dropout_keeps_the_mean_and_repeats(dtype: torch.dtype) -> None:
    layout = Layout([64] * 64, torch.device("cuda"))
    projections = torch.randn(64 * 64, 3 * 64, device="cuda", dtype=dtype)
    plain = packed_attention(projections, layout, 4)
    torch.cuda.manual_seed(3)
    many = torch.stack([packed_attention(projections, layout, 4, dropout=0.1) for _ in range(200)])
    torch.cuda.manual_seed(3)
    assert torch.equal(many[0], packed_attention(projections, layout, 4, dropout=0.1))
    assert not torch.equal(many[0], many[1])
    assert (many.float().mean(0) - plain.float()).abs().mean() < 0.02


# ---- dropout ----


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_are_drawn_with_the_given_probability(probability: float) -> None:
    torch.manual_seed(0)
    source = MaskSource(probability)
    mask = source.draw(1000, 1001)
    assert mask.dtype == torch.int8 and set(mask.unique().tolist()) == {0, 1}
    deviation = math.sqrt(probability * (1 - probability) / mask.numel())
    assert abs(float(mask.float().mean()) - (1 - probability)) < 4 * deviation
    # Neighbors, rows and columns are independent: products of two have the product of the means.
    x = mask.float() - (1 - probability)
    for shift, dim in ((1, 0), (1, 1), (4, 1)):
        covariance = float((x * x.roll(shift, dim)).mean()) / (probability * (1 - probability))
        assert abs(covariance) < 4 / math.sqrt(mask.numel())
    assert source.scale == pytest.approx(1 / (1 - probability), rel=2e-4)


def test_dropout_scales_what_it_keeps_and_repeats_by_seed() -> None:
    x = torch.randn(50, 64, requires_grad=True)
    torch.manual_seed(4)
    y = dropout(x, 0.2, True)
    kept = y != 0
    scale = float(y[kept][0] / x[kept][0])
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0.0))
    assert scale == pytest.approx(1.25, rel=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept * scale)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.2, True), y)
    assert dropout(x, 0.2, False) is x and dropout(x, 0.0, True) is x
    with pytest.raises(ValueError, match="probability"):
        MaskSource(1.0)


def test_dropout_repeats_under_checkpointing() -> None:
    x = torch.randn(50, 64, requires_grad=True)
    y = checkpoint(lambda t: dropout(t.sin(), 0.5, True), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


# ---- linear layers ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
def test_linear_equals_torchs(bias: bool, frozen: str) -> None:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(7, 12), "weight": torch.randn(5, 12)} | ({"bias": torch.randn(5)} if bias else {})
    for name, tensor in tensors.items():
        tensor.requires_grad = name != frozen
    arguments = tensors["x"], tensors["weight"], tensors.get("bias")
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    check_gradients(linear(*arguments), F.linear(*arguments), wanted, 1e-5)


def test_linear_under_autocast_has_torchs_dtypes() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(20, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = apply_linear(layer, x), layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    ours.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_fused_equals_the_steps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x, residual = nn.Linear(64, 48).to(dtype), torch.randn(20, 64, dtype=dtype), torch.randn(20, 48, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    untouched = residual.clone()
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(layer, nn.GELU(), x), F.gelu(layer(x)), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(linear_add(layer, x, residual), layer(x) + residual, rtol=tolerance, atol=tolerance)
        tanh = nn.GELU(approximate="tanh")
        torch.testing.assert_close(linear_gelu(layer, tanh, x), tanh(layer(x)), rtol=tolerance, atol=tolerance)
    assert torch.equal(residual, untouched)


def test_hooked_and_subclassed_layers_are_called() -> None:
    calls = []
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: calls.append("hook"))

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 4)
    apply_linear(layer, x)
    assert calls == ["hook"]
    double = Doubled(4, 4)
    torch.testing.assert_close(apply_linear(double, x), 2 * F.linear(x, double.weight, double.bias))


# ---- experts ----


@pytest.mark.parametrize("gradient", ["none", "straight_through"])
@pytest.mark.parametrize("starved", [False, True])
def test_grouped_product_equals_the_layer(gradient: str, starved: bool) -> None:
    """The GPU's way of computing experts, on the CPU, where ``grouped_mm`` runs in bf16 too."""
    torch.manual_seed(2)
    layer = MoELinear.from_linear(nn.Linear(32, 48), MoEConfig("intermediate", num_experts=3, router_gradient=gradient))
    for parameter in layer.experts.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    if starved:
        layer.gate.weight.data[1] = layer.gate.weight.data[0]  # ties go to one of the two
    layer = layer.bfloat16()
    layer.gate.float()
    x = torch.randn(50, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 48, dtype=torch.bfloat16)
    results = []
    for grouped in (True, False):
        routing = layer.route(x)
        assignment = Assignment(routing, 3)
        if grouped:
            y = layer.with_gate(assignment.restore(grouped_product(layer, assignment.group(x), assignment)), routing)
        else:
            y = layer.mix(x, routing)
        (y * weight).sum().backward()
        results.append((y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}))
        x.grad = None
        layer.zero_grad(set_to_none=True)
        assert assignment.counts() == torch.diff(assignment.ends(), prepend=torch.zeros(1)).tolist()
    (y1, x1, g1), (y2, x2, g2) = results
    torch.testing.assert_close(y1, y2, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x1, x2, rtol=5e-2, atol=5e-2)
    for name, value in g2.items():
        assert (value is None) == (g1[name] is None), name
        torch.testing.assert_close(g1[name], value, rtol=5e-2, atol=8e-2, msg=name)
    assert float(g1["gate.weight"].abs().max()) > 0 or gradient == "none"


@pytest.mark.parametrize("gradient", ["none", "straight_through"])
def test_fillers_change_no_result_and_no_gradient(gradient: str) -> None:
    """Rows that fill an expert's slice up hold the first token: nobody reads them, and no gradient comes from them."""
    torch.manual_seed(2)
    layer = MoELinear.from_linear(nn.Linear(32, 48), MoEConfig("intermediate", num_experts=3, router_gradient=gradient))
    layer.gate.weight.data[1] = layer.gate.weight.data[0]  # one expert of the two gets no token
    narrow = nn.Linear(48, 32)
    x = torch.randn(50, 32, requires_grad=True)
    weight = torch.randn(50, 32)
    results = []
    for fill in (1, 16):
        routing = layer.route(x)
        assignment = Assignment(routing, 3, fill)
        rows = assignment.rows()
        assert all(count % fill == 0 for count in rows) and len(assignment.order) == sum(rows)
        assert (fill == 1) == (sum(rows) == 50) and 0 in rows
        y = assignment.restore(_by_slices(layer, assignment.group(x), assignment, nn.GELU(), narrow))
        tensors = [x, *layer.experts.parameters(), *narrow.parameters()]
        tensors += [layer.gate.weight] if gradient != "none" else []
        results.append([y, *torch.autograd.grad((y * weight).sum(), tensors)])
    for plain, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-5, atol=1e-5)
    assert results[0][1].abs().max() > 0
