"""Slabs: planned once, filled where it pays, the same bits on any number of threads; dropout when packed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.options import EngineConfig
from FlagEmbedding.modeling.packed import packed_forward
from FlagEmbedding.modeling.slabs import Slabs, fill_price, plan_slabs
from FlagEmbedding.modeling.tokens import TokenBatch

pytestmark = pytest.mark.numeric


def batch(lengths: list[int]) -> TokenBatch:
    torch.manual_seed(0)
    return TokenBatch.from_lists([torch.randint(4, 90, (length,)).tolist() for length in lengths])


@pytest.mark.parametrize(
    ("lengths", "budget", "price", "expected"),
    [
        ([15], 2048, 1 / 8, [[15]]),  # one query: 17 tokens more are too many
        ([15], 2048, math.inf, [[17, 15]]),
        ([100, 100, 50], 2048, 1 / 8, [[100, 100, 50, 6]]),
        ([100, 94], 200, math.inf, [[100, 94]]),  # 30 more would not fit
        ([100, 94], 224, math.inf, [[100, 94, 30]]),
        ([100, 100, 50, 3, 3], 2048, 1 / 8, [[100, 100, 50, 3, 3]]),  # a whole multiple already
        ([40, 30], 50, 0.0, [[40], [30]]),
        ([300, 20], 310, 1 / 8, [[300], [20]]),
    ],
)
def test_a_slab_is_filled_where_it_pays_and_within_the_budget(
    lengths: list[int], budget: int, price: float, expected: list[list[int]]
) -> None:
    tokens = batch(lengths)
    slabs = Slabs(tokens, budget, fill_price=price)
    assert [slab.lengths for slab in slabs.batches] == expected
    pieces = [piece for slab in slabs.batches for piece in slab.ids.split(slab.lengths)]
    for ids, place in zip(tokens.ids.split(tokens.lengths), slabs.place, strict=True):
        assert torch.equal(pieces[place], ids)


def test_padding_counts_for_the_padded_engine() -> None:
    assert plan_slabs([10, 2, 2, 2], 20, padded=True) == [[0, 1], [2, 3]]
    assert plan_slabs([10, 2, 2, 2], 20) == [[0, 1, 2, 3]]


def test_fp32_is_filled_at_a_small_price_only() -> None:
    assert fill_price(torch.float32) == 1 / 8
    assert fill_price(torch.bfloat16) >= 1 / 8


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_every_slab_is_one_forward_of_the_planned_size(tiny_model_dir: Path, engine: str) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), engine=EngineConfig(engine)).eval()
    seen: list[int] = []
    encoder.model.embeddings.word_embeddings.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    encoder.infer(batch([100, 100, 50, 94, 100]), {"dense"}, 260)
    # Packed: 200 filled up with 24, 244 with 12. Padded: two of 100, 100 and 94, and 50 alone.
    assert sorted(seen) == ([224, 256] if engine == "packed" else [50, 200, 200])


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_slabs_and_threads_give_the_same_bits(tiny_model_dir: Path, engine: str) -> None:
    torch.manual_seed(3)
    heads = torch.nn.Linear(32, 8), torch.nn.Linear(32, 1)
    encoder = M3Encoder(load_backbone(tiny_model_dir), *heads, engine=EngineConfig(engine)).eval()
    tokens = batch([3 + (7 * i) % 50 for i in range(60)])
    kinds = {"dense", "sparse", "colbert"}
    results = []
    threads, inside = torch.get_num_threads(), set()
    encoder.model.embeddings.register_forward_pre_hook(lambda *_: inside.add(torch.get_num_threads()))
    encoder.model.embeddings.LayerNorm.register_forward_hook(lambda *_: inside.add(torch.get_num_threads()))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(encoder.infer(tokens, kinds, 200))
            encoder.infer(batch([5]), kinds, 200)  # a single slab
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert inside == {1}  # more would add up a product in another order
    with torch.no_grad():
        (whole,) = encoder.encode([tokens], [kinds], slab_tokens=0)
    for name in ("dense", "token_weights", "colbert"):
        one, many = (getattr(result, name) for result in results)
        assert torch.equal(one, many), name
        torch.testing.assert_close(one, getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_the_budget_is_an_argument(tiny_model_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir)).train()
    seen: list[int] = []
    for layer in encoder.model.encoder.layer[:1]:
        layer.attention.output.LayerNorm.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    encoder.encode([batch([10, 10, 10])], [{"dense"}], slab_tokens=20)
    encoder.encode([batch([10, 10, 10])], [{"dense"}])
    assert seen == [20, 10, 30]


@pytest.mark.parametrize("place", ["embeddings", "attention", "attention output", "feed-forward"])
def test_dropout_acts_at_every_place(tiny_model_dir: Path, place: str) -> None:
    """A place alone, at 0.3: random while training, repeated by the seed, absent in evaluation."""
    model = load_backbone(tiny_model_dir).train()
    layer = model.encoder.layer[0]
    module = {
        "embeddings": model.embeddings.dropout,
        "attention": layer.attention.self.dropout,
        "attention output": layer.attention.output.dropout,
        "feed-forward": layer.output.dropout,
    }[place]
    tokens = batch([9, 9, 4])
    with torch.no_grad():
        plain = packed_forward(model, tokens)
        module.p = 0.3
        torch.manual_seed(1)
        draws = [packed_forward(model, tokens) for _ in range(20)]
        torch.manual_seed(1)
        assert torch.equal(packed_forward(model, tokens), draws[0])
        model.eval()
        assert torch.equal(packed_forward(model, tokens), plain)
    assert all(not torch.allclose(draw, plain, atol=1e-3) for draw in draws)
    assert not torch.equal(draws[0], draws[1])
