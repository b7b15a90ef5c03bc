"""M3Encoder's padded engine, its heads and pooling, and the batch of tokens, each against loops over rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import SUB_BATCH_BY_LENGTH, EngineConfig, M3Encoder
from FlagEmbedding.modeling.pooling import pool_packed, pool_padded
from FlagEmbedding.modeling.slabs import Layout
from FlagEmbedding.modeling.tokens import TokenBatch, offsets
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

ROWS = [[0, 7, 8, 9, 2], [0, 11, 2], [0, 5, 6, 7, 8, 9, 10, 2], [0, 2], [0, 30, 31, 2]]
OTHERS = [[0, 40, 41, 42, 2], [0, 50, 2]]
EVERYTHING = {"dense", "sparse", "colbert"}


def encoder(folder: Path, engine: str, **settings) -> M3Encoder:
    torch.manual_seed(3)
    heads = {"colbert_linear": nn.Linear(32, 8), "sparse_linear": nn.Linear(32, 1)}
    model = M3Encoder(load_backbone(folder), **heads, engine=EngineConfig(engine, slab_tokens=11), **settings)
    return model.double()


def padded(rows: list[list[int]], extra: int = 0) -> TokenBatch:
    length = max(map(len, rows)) + extra
    ids = torch.tensor([row + [1] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return TokenBatch.from_padded({"input_ids": ids, "attention_mask": mask})


def row_states(folder: Path, row: list[int]) -> Tensor:
    """One row alone through transformers' own model: ``[length, D]``."""
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).double().eval()
    return model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).last_hidden_state[0]


@pytest.mark.parametrize("engine", ["padded", "packed"])
@pytest.mark.parametrize(("pooling", "normalize"), [("cls", True), ("mean", True), ("mean", False)])
def test_every_representation_equals_the_row_computed_alone(
    engine: str, pooling: str, normalize: bool, tiny_model_dir: Path
) -> None:
    model = encoder(tiny_model_dir, engine, pooling=pooling, normalize=normalize).eval()
    batches = [padded(ROWS), padded(OTHERS, extra=3)]
    with torch.no_grad():
        first, second = model.encode(batches, [EVERYTHING, {"dense"}])
    assert second.token_weights is None
    assert second.colbert is None
    assert first.colbert.shape == (first.tokens.ids.shape[0] - len(ROWS), 8)
    position = later = 0
    for i, row in enumerate(ROWS + OTHERS):
        states = row_states(tiny_model_dir, row)
        dense = states[0] if pooling == "cls" else sum(states) / len(row)
        dense = dense / dense.norm() if normalize else dense
        got = first.dense[i] if i < len(ROWS) else second.dense[i - len(ROWS)]
        torch.testing.assert_close(got, dense, rtol=0, atol=1e-9)
        if i >= len(ROWS):
            continue
        for t in range(len(row)):
            weight = (model.sparse_linear.weight[0] * states[t]).sum() + model.sparse_linear.bias[0]
            assert float(first.token_weights[position]) == pytest.approx(max(float(weight), 0.0), abs=1e-9)
            position += 1
            if t:
                vector = model.colbert_linear.weight @ states[t] + model.colbert_linear.bias
                vector = vector / vector.norm() if normalize else vector
                torch.testing.assert_close(first.colbert[later], vector, rtol=0, atol=1e-9)
                later += 1
    assert float(first.token_weights.max()) > 0.0


def test_colbert_padded_keeps_values_zeros_and_gradient(tiny_model_dir: Path) -> None:
    model = encoder(tiny_model_dir, "padded")
    tokens = padded(ROWS, extra=2)
    (result,) = model.encode([tokens], [{"colbert"}])
    assert result.dense is None
    vectors, mask = result.colbert_padded()
    assert vectors.shape == (5, tokens.padded_length - 1, 8)
    assert mask.sum(dim=1).tolist() == [len(row) - 1 for row in ROWS]
    assert torch.equal(vectors[mask], result.colbert)
    assert float(vectors[~mask].abs().max()) == 0.0
    vectors.square().sum().backward()
    assert model.colbert_linear.weight.grad is not None
    with pytest.raises(ValueError, match="not asked for"):
        model.encode([tokens], [{"dense"}])[0].colbert_padded()


@pytest.mark.parametrize(("length", "size"), [(600, 16), (511, 32), (1000, 9), (2000, 5), (6000, 1), (7000, 1)])
def test_sub_batches_follow_the_published_table(length: int, size: int) -> None:
    assert next(rows for least, rows in SUB_BATCH_BY_LENGTH if length >= least) == size


def test_sub_batches_change_nothing(tiny_model_dir: Path) -> None:
    rows = [[0, *range(5, 5 + n % 9), 2] for n in range(70)]
    seen: list[int] = []
    results = []
    for enabled in (True, False):
        model = encoder(tiny_model_dir, "padded").eval()
        model.engine = EngineConfig("padded", enable_sub_batch=enabled)
        model.model.embeddings.register_forward_hook(lambda _, __, output: seen.append(output.shape[0]))
        with torch.no_grad():
            results += model.encode([padded(rows)], [EVERYTHING])
    assert seen == [32, 32, 6, 70]
    for name in ("dense", "token_weights", "colbert"):
        torch.testing.assert_close(getattr(results[0], name), getattr(results[1], name), rtol=0, atol=1e-12)


def test_what_cannot_be_given_is_said(tiny_model_dir: Path) -> None:
    tokens = padded(ROWS)
    bare = M3Encoder(load_backbone(tiny_model_dir))
    with pytest.raises(UsageError, match="sparse vectors need the checkpoint's sparse_linear head"):
        bare.encode([tokens], [{"dense", "sparse"}])
    with pytest.raises(ValueError, match="want must name some of"):
        bare.encode([tokens], [{"foo"}])
    with pytest.raises(ValueError, match="one set for each of the 1 batches, got 2"):
        bare.encode([tokens], [{"dense"}, {"dense"}])
    with pytest.raises(UsageError, match="pooling must be cls or mean, got 'foo'"):
        M3Encoder(bare.model, pooling="foo")
    with pytest.raises(UsageError, match="engine must be packed or padded, got 'foo'"):
        EngineConfig(engine="foo")
    with pytest.raises(UsageError, match="slab_tokens must be 0"):
        EngineConfig(slab_tokens=-1)


# ---- tokens and pooling ----


def test_tokens_there_and_back() -> None:
    tokens = TokenBatch.from_lists(ROWS)
    assert (len(tokens), tokens.padded_length, offsets(tokens.lengths)) == (5, 8, [0, 5, 8, 16, 18, 22])
    ids, mask = tokens.pad(1, length=10)
    assert ids.shape == (5, 10)
    assert (ids[1].tolist(), mask[1].tolist()) == ([0, 11, 2] + [1] * 7, [1] * 3 + [0] * 7)
    again = TokenBatch.from_padded({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(again.ids, tokens.ids)
    assert (again.lengths, again.padded_length) == (tokens.lengths, 10)
    left = TokenBatch.from_padded({"input_ids": ids.flip(1), "attention_mask": mask.flip(1)})
    assert left.ids[:5].tolist() == ROWS[0][::-1]

    chosen = tokens.select([4, 0, 0])
    assert chosen.ids.tolist() == ROWS[4] + ROWS[0] + ROWS[0]
    assert (chosen.lengths, chosen.padded_length) == ([4, 5, 5], 8)
    assert tokens.select([]).ids.shape == (0,)
    both = TokenBatch.cat([again, TokenBatch.from_lists(OTHERS)])
    assert both.ids.tolist() == [token for row in ROWS + OTHERS for token in row]
    assert both.padded_length == 10


@pytest.mark.parametrize("method", ["cls", "mean"])
def test_pooling_equals_loops(method: str) -> None:
    lengths = [3, 1, 5]
    hidden = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    loops = [row[0] if method == "cls" else sum(row[:n]) / n for row, n in zip(hidden, lengths, strict=True)]
    expected = torch.stack(loops)
    torch.testing.assert_close(pool_padded(hidden, mask, method), expected)
    torch.testing.assert_close(pool_packed(hidden[mask.bool()], Layout(lengths, hidden.device), method), expected)


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(UsageError, match="pooling must be cls or mean"):
        pool_packed(torch.zeros(2, 3), Layout([1, 1], torch.device("cpu")), "max")
