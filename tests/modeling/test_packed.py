"""The packed engine against transformers' padded forward: values, losses and every gradient."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import write_tiny
from torch import Tensor, nn
from transformers import AutoModel

from FlagEmbedding.losses.contrastive import colbert_scores, dense_scores, sparse_scores
from FlagEmbedding.losses.objective import retrieval_objective
from FlagEmbedding.losses.penalty import apply_penalty, clp_penalty
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder
from FlagEmbedding.modeling.moe import MoEConfig, record_routing
from FlagEmbedding.modeling.packed import WordTable, packed_forward, why_not_packable
from FlagEmbedding.modeling.slabs import FILL, Layout, plan_slabs
from FlagEmbedding.modeling.tokens import TokenBatch, offsets
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

LENGTHS = [17, 3, 9, 9, 30, 5, 9, 2, 1, 5]


def batch(lengths: list[int] = LENGTHS, seed: int = 0) -> TokenBatch:
    """Random rows, with a padding id (1) amid one of them, which shifts XLM-R's positions."""
    torch.manual_seed(seed)
    rows = [torch.randint(4, 90, (length,)).tolist() for length in lengths]
    rows[0][5 % len(rows[0])] = 1
    return TokenBatch.from_lists(rows)


def reference(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """Row by row through transformers, without padding at all: ``[T, D]``."""
    pieces = tokens.ids.split(tokens.lengths)
    return torch.cat([model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])[0][0] for ids in pieces])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same names; largest difference within ``tolerance`` of the largest gradient; not all of them zero."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=tolerance * max(1.0, largest), msg=name)


# ---- the forward ----


@pytest.mark.parametrize("kind", ["tiny_model_dir", "tiny_roberta_dir", "tiny_bert_dir"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_states_and_gradients_equal_rows_alone(
    kind: str, first: bool, ordered: bool, request: pytest.FixtureRequest
) -> None:
    model = AutoModel.from_pretrained(request.getfixturevalue(kind), add_pooling_layer=False).train()
    tokens = batch(sorted(LENGTHS, reverse=True) if ordered else LENGTHS)
    expected = reference(model, tokens)
    if first:
        expected = expected[offsets(tokens.lengths)[:-1]]
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    wanted = gradients(model)
    found = packed_forward(model, tokens, first_tokens_only=first)
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), wanted)
    with torch.inference_mode():
        found = packed_forward(model.eval(), tokens, first_tokens_only=first)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize("gradient", ["none", "straight_through"])
def test_experts_with_fillers_equal_rows_alone(tiny_model_dir: Path, place: str, gradient: str) -> None:
    """Enough tokens that experts need fillers after whole blocks, and one expert that gets none."""
    config = MoEConfig(moe=place, num_experts=4, router_gradient=gradient)
    torch.manual_seed(1)  # gates under which some expert needs fillers
    model = load_backbone(tiny_model_dir, moe=config).train()
    for layer in moe_layers(model):
        with torch.no_grad():
            for expert in layer.experts:
                expert.weight.add_(0.05 * torch.randn_like(expert.weight))
            layer.gate.weight[3] = (layer.gate.weight[0] + layer.gate.weight[1]) / 2  # never the greatest
    tokens = batch([61, 48, 40, 40, 33, 20, 9, 9, 2])
    expected = reference(model, tokens)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    wanted = gradients(model)
    with record_routing(model) as tape:
        found = packed_forward(model, tokens)
    counts = [torch.bincount(calls[0].experts.reshape(-1), minlength=4).tolist() for calls in tape.layers]
    assert all(count[3] == 0 for count in counts)
    assert any(n > FILL and n % FILL for count in counts for n in count)
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same({k: v for k, v in gradients(model).items() if v.any()}, {k: v for k, v in wanted.items() if v.any()})
    with torch.inference_mode():
        torch.testing.assert_close(packed_forward(model.eval(), tokens), expected, rtol=1e-5, atol=1e-5)


def test_plain_operators_give_the_same_as_onednn(tiny_model_dir: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model_dir, add_pooling_layer=False).train()
    tokens = batch()
    fused = packed_forward(model, tokens)
    fused.square().sum().backward()
    wanted = gradients(model)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = packed_forward(model, tokens)
        plain.square().sum().backward()
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_stays_within_its_rounding(tiny_model_dir: Path, autocast: bool) -> None:
    model = AutoModel.from_pretrained(tiny_model_dir, add_pooling_layer=False).eval()
    tokens = batch()
    with torch.no_grad():
        exact = reference(model, tokens)
        low = model if autocast else copy.deepcopy(model).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            theirs, ours = reference(low, tokens), packed_forward(low, tokens)
    assert ours.dtype == theirs.dtype
    # As near to the truth as transformers' own forward in the same precision.
    assert (ours.float() - exact).abs().mean() < 1.2 * (theirs.float() - exact).abs().mean() + 1e-6


@pytest.mark.parametrize("moe", [None, "intermediate", "output"])
def test_gradient_checkpointing_changes_nothing(tiny_dropout_dir: Path, moe: str | None) -> None:
    config = MoEConfig(moe=moe, num_experts=3) if moe else None
    model = load_backbone(tiny_dropout_dir, moe=config).train()
    tokens = batch()
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss = packed_forward(model, tokens).square().sum()
        loss.backward()
        results.append((float(loss.detach()), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same(results[1][1], results[0][1])


def test_frozen_layers_below_keep_no_graph(tiny_dropout_dir: Path) -> None:
    model = AutoModel.from_pretrained(tiny_dropout_dir, add_pooling_layer=False).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("encoder.layer.1.intermediate")
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        half = load_backbone(tiny_dropout_dir).train().requires_grad_(False)
        packed_forward(half, batch())
        assert not kept
        states = packed_forward(model, batch())
    assert kept
    states.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "encoder.layer.1.intermediate.dense.weight",
        "encoder.layer.1.intermediate.dense.bias",
    }


def test_the_same_words_looked_up_once(tiny_model_dir: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model_dir, add_pooling_layer=False).train()
    tokens = batch()
    packed_forward(model, tokens).square().sum().backward()
    wanted = gradients(model)
    (table,) = WordTable.of_slabs(model, [tokens.ids])
    assert len(table.weight) == len(set(tokens.ids.tolist())) < len(tokens.ids)
    packed_forward(model, tokens, words=table).square().sum().backward()
    assert_same(gradients(model), wanted)


def test_other_structures_are_refused(tiny_model_dir: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    other = DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=1, hidden_dim=8))
    assert why_not_packable(other) is not None
    with pytest.raises(UsageError, match="--engine padded"):
        packed_forward(other, batch())
    assert why_not_packable(AutoModel.from_pretrained(tiny_model_dir)) is None


# ---- the whole objective, all roles ----


def objective(encoder: M3Encoder, roles: list[TokenBatch], group: int) -> Tensor:
    """Unified objective and penalty over queries, passages and negative queries, and a router loss."""
    with record_routing(encoder.model) as tape:
        full = {"dense", "sparse", "colbert"}
        q, p, n = encoder.encode(roles, [full, full, {"dense"}])
    sparse = sparse_scores(
        q.tokens.ids,
        q.token_weights,
        q.tokens.lengths,
        p.tokens.ids,
        p.token_weights,
        p.tokens.lengths,
        [0, 1, 2],
        0.05,
    )
    q_colbert, q_mask = q.colbert_padded()
    colbert = colbert_scores(q_colbert, q_mask, p.colbert_padded()[0], 0.05)
    terms = retrieval_objective(
        dense_scores(q.dense, p.dense, 0.05), sparse, colbert, group_size=group, self_distill=True
    )
    owner = torch.tensor([row for row in range(len(p.tokens)) if row % group][: len(n.tokens)])
    loss = apply_penalty(terms["loss"], clp_penalty(p.dense, n.dense, owner), 0.1)
    logits = [torch.cat([routing.logits for routing in calls]) for calls in tape.layers]
    return loss + sum((layer.logsumexp(-1).square().mean() for layer in logits), torch.zeros(())) * 0.01


def roles(seed: int) -> list[TokenBatch]:
    torch.manual_seed(seed)
    made = []
    for rows, longest in ((3, 9), (9, 40), (5, 12)):
        made.append(batch(torch.randint(2, longest, (rows,)).tolist(), seed + rows))
    return made


def make_encoder(folder: Path, engine: EngineConfig, pooling: str, moe: MoEConfig | None) -> M3Encoder:
    torch.manual_seed(5)
    model = load_backbone(folder, moe=moe)
    for layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    heads = nn.Linear(32, 16), nn.Linear(32, 1)
    encoder = M3Encoder(model, *heads, pooling=pooling, engine=engine).train()
    encoder.all_rows = moe is not None  # the router loss below reads the last layer's routing of every token
    return encoder


MOE = [
    None,
    MoEConfig(moe="intermediate", num_experts=2),
    MoEConfig(moe="intermediate", num_experts=4, num_experts_per_tok=2, router_gradient="straight_through"),
    MoEConfig(moe="output", num_experts=3, router_gradient="straight_through"),
]


@pytest.mark.parametrize("moe", MOE)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_equal_the_padded_engine(
    tiny_model_dir: Path, moe: MoEConfig | None, pooling: str, seed: int
) -> None:
    results = []
    for engine in (
        EngineConfig("padded"),
        EngineConfig("packed", slab_tokens=0),
        EngineConfig("packed", slab_tokens=40),
        EngineConfig("packed", slab_tokens=40, grad_cache=True),
    ):
        encoder = make_encoder(tiny_model_dir, engine, pooling, moe)
        loss = objective(encoder, roles(seed), 3)
        loss.backward()
        results.append((float(loss.detach()), gradients(encoder)))
    for loss_found, found in results[1:]:
        assert loss_found == pytest.approx(results[0][0], abs=1e-5)
        assert_same(found, results[0][1])


# ---- gradient caching ----


@pytest.mark.parametrize("moe", MOE[:2])
def test_gradient_caching_replays_dropout_and_jitter(tiny_dropout_dir: Path, moe: MoEConfig | None) -> None:
    results = []
    for cached in (False, True):
        encoder = make_encoder(tiny_dropout_dir, EngineConfig(slab_tokens=40, grad_cache=cached), "cls", moe)
        for layer in moe_layers(encoder.model):
            layer.router_jitter = 0.1
        torch.manual_seed(9)
        loss = objective(encoder, roles(2), 3)
        loss.backward()
        results.append((float(loss.detach()), gradients(encoder)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert_same(results[1][1], results[0][1], tolerance=1e-6)


def test_gradient_caching_keeps_one_slab_of_activations(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "deep", "xlmr", num_hidden_layers=4)
    sizes = {}
    for rows in (8, 64):
        encoder = M3Encoder(load_backbone(folder), engine=EngineConfig(slab_tokens=80, grad_cache=True)).train()
        kept = [0]

        def count(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder.encode([batch([20] * rows)], [{"dense"}])
        sizes[rows] = kept[0]
    # What is kept between forward and backward: rows and vectors, nothing that grows with layers.
    per_row = (sizes[64] - sizes[8]) / 56
    assert per_row < 20 * 32 * 4


# ---- layout ----


def test_slabs_hold_every_row_once_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(4)
    for budget in (0, 1, 50, 333):
        lengths = torch.randint(1, 120, (83,), generator=generator).tolist()
        slabs = plan_slabs(lengths, budget)
        assert sorted(row for slab in slabs for row in slab) == list(range(83))
        flat = [lengths[row] for slab in slabs for row in slab]
        assert flat == sorted(flat, reverse=True)
        for slab in slabs:
            assert slab and (budget == 0 or len(slab) == 1 or sum(lengths[row] for row in slab) <= budget)
        assert budget or len(slabs) == 1
    assert plan_slabs([], 10) == []


def test_layout_names_every_row_and_token() -> None:
    layout = Layout([4, 4, 2, 4], torch.device("cpu"))
    assert [(g.row, g.token, g.count, g.length) for g in layout.groups] == [(0, 0, 2, 4), (2, 8, 1, 2), (3, 10, 1, 4)]
    assert layout.cumulative.tolist() == [0, 4, 8, 10, 14]
    assert layout.starts.tolist() == [0, 4, 8, 10]
    assert layout.row_of_token.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4
    assert layout.row_numbers.tolist() == [0, 1, 2, 3, 4]
