"""The encoder in one compiled call: against transformers' own forward in float64, to the bit whatever stands beside a
row, and never with weights of yesterday."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny
from kernel_sets import compiled, instruction_set  # noqa: F401 — a fixture
from torch import Tensor, nn

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.modeling import kernels
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers
from FlagEmbedding.modeling.compiled import FEW_ROWS, CompiledEncoder, can_compile
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.moe import MoEConfig, record_routing
from FlagEmbedding.modeling.packed import packed_forward, prepack_weights
from FlagEmbedding.modeling.tokens import TokenBatch, offsets

pytestmark = compiled
# More than a block of rows (48) in all, rows around a tile's height (6, 12), a single token, and lengths met twice.
LENGTHS = [61, 48, 33, 13, 12, 7, 7, 6, 5, 2, 1]


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More inputs than a panel's block holds (384), outputs that are no whole number of panels, three layers."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    return write_tiny(folder, "xlmr", hidden_size=48, num_attention_heads=3, intermediate_size=816, num_hidden_layers=3)


def batch(lengths: list[int]) -> TokenBatch:
    """Random rows, with a padding id (1) amid the first, which shifts XLM-R's positions."""
    torch.manual_seed(0)
    rows = [torch.randint(4, 90, (length,)).tolist() for length in lengths]
    rows[0][5] = 1
    return TokenBatch.from_lists(rows)


def build(folder: Path, place: str | None = None, **options: Any) -> Any:
    """A model ready to encode, with experts that differ where ``place`` names some."""
    torch.manual_seed(1)
    config = MoEConfig(moe=place, **{"num_experts": 3, **options}) if place else None
    model = load_backbone(folder, moe=config).eval()
    for layer in moe_layers(model):
        with torch.no_grad():
            for expert in layer.experts:
                expert.weight.add_(0.1 * torch.randn_like(expert.weight))
    return model


def in_float64(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """Row by row through transformers' own forward: ``[T, D]`` float64."""
    exact = copy.deepcopy(model).double()
    pieces = tokens.ids.split(tokens.lengths)
    return torch.cat([exact(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])[0][0] for ids in pieces])


@torch.inference_mode()
def states(model: Any, tokens: TokenBatch, first: bool = False) -> Tensor:
    return packed_forward(model, tokens, first_tokens_only=first)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 47, 48, 49, 100])
@pytest.mark.parametrize("inputs, outputs", [(16, 16), (384, 48), (400, 32), (1536, 16), (48, 80)])
def test_a_product(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for own in (bias, None):
        found = kernels.product(x, weight, own)
        expected = x.double() @ weight.double().T + (0 if own is None else own.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6 * inputs**0.5)
        alone = torch.cat([kernels.product(row[None].contiguous(), weight, own) for row in x])
        assert torch.equal(found, alone)


@pytest.mark.parametrize("kind", ["tiny_model_dir", "tiny_roberta_dir", "tiny_bert_dir", "wide_dir"])
@pytest.mark.parametrize("place", [None, "intermediate", "output"])
def test_states_are_those_of_the_reference(kind: str, place: str | None, request: pytest.FixtureRequest) -> None:
    model, tokens = build(request.getfixturevalue(kind), place), batch(LENGTHS)
    compiled_encoder = CompiledEncoder(model)
    compiled_encoder.most_tokens = None
    model.__dict__["_compiled"] = compiled_encoder
    with torch.inference_mode():
        assert can_compile(model) and compiled_encoder.takes(len(tokens.ids))
        expected = in_float64(model, tokens)
        if place:
            with record_routing(model) as tape:
                states(model, tokens)
            assert all(calls[0].experts.unique().numel() > 1 for calls in tape.layers)
    found = states(model, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    first = states(model, tokens, first=True)
    starts = torch.tensor(offsets(tokens.lengths)[:-1])
    assert torch.equal(first, found[starts])
    # Alone and in another order: the same bits.
    for number, piece in enumerate(found.split(tokens.lengths)):
        assert torch.equal(states(model, tokens.select([number])), piece)
    back = states(model, tokens.select([*reversed(range(len(LENGTHS)))]))
    assert torch.equal(torch.cat([*reversed(back.split(LENGTHS[::-1]))]), found)


def test_its_slabs_are_not_filled_up(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling up saves compiling code for a size, and the compiled encoder knows none."""
    encoder = M3Encoder(build(tiny_model_dir)).eval()
    prepack_weights(encoder.model, 2048)
    kept = encoder.model.__dict__["_compiled"]
    seen: list[int] = []
    monkeypatch.setattr(kept, "takes", lambda tokens: seen.append(tokens) or False)
    for most, expected in ((None, 60), (FEW_ROWS, 64)):
        kept.most_tokens = most
        encoder.infer(batch([30, 20, 10]), {"dense"}, 2048)
        assert seen.pop() == expected


def test_autocast_asks_for_another_dtype(tiny_model_dir: Path) -> None:
    model, tokens = build(tiny_model_dir), batch([9, 4])
    prepack_weights(model, 2048)
    with torch.autocast("cpu", torch.bfloat16):
        found = states(model, tokens)
        expected = packed_forward(copy.deepcopy(model), tokens)
    assert torch.equal(found, expected)
    assert not torch.equal(found, states(model, tokens))


def test_no_layers_and_no_rows(tmp_path: Path) -> None:
    model = build(write_tiny(tmp_path / "empty", "xlmr", num_hidden_layers=0))
    prepack_weights(model, 2048)
    tokens = batch([7, 3])
    torch.testing.assert_close(states(model, tokens).double(), in_float64(model, tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(states(model, tokens, first=True), states(model, tokens)[[0, 7]])
    assert states(model, TokenBatch.from_lists([])).shape == (0, 32)


def replace_module(model: Any) -> None:
    model.encoder.layer[1].output.dense = nn.Linear(48, 32)


def hook(model: Any) -> None:
    model.encoder.layer[0].attention.self.key.register_forward_hook(lambda module, inputs, output: output * 2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.encoder.layer[1].intermediate.dense.weight.mul_(2),
    "a norm's bias": lambda m: m.encoder.layer[0].output.LayerNorm.bias.add_(1),
    "a word": lambda m: m.embeddings.word_embeddings.weight.mul_(1.5),
    "new tensor": lambda m: setattr(m.encoder.layer[0].attention.self.value.bias, "data", torch.randn(32)),
    "new parameter": lambda m: setattr(m.encoder.layer[0].output.dense, "weight", nn.Parameter(torch.randn(32, 48))),
    "new module": replace_module,
    "new layer": lambda m: m.encoder.layer.__setitem__(0, copy.deepcopy(m.encoder.layer[1])),
    "a layer less": lambda m: m.encoder.layer.__delitem__(1),
    "a layer more": lambda m: m.encoder.layer.append(copy.deepcopy(m.encoder.layer[0])),
    "loaded": lambda m: m.load_state_dict({key: torch.randn_like(value) for key, value in m.state_dict().items()}),
    "hooked": hook,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_never_served_from_what_was_laid_out(change: str, tiny_model_dir: Path) -> None:
    model, tokens = build(tiny_model_dir), batch([9, 4])
    prepack_weights(model, 2048)
    before = states(model, tokens)
    with torch.no_grad():
        CHANGES[change](model)
        after, expected = states(model, tokens), packed_forward(copy.deepcopy(model), tokens)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_training_and_recording_go_the_usual_way(tiny_model_dir: Path) -> None:
    model, tokens = build(tiny_model_dir, "intermediate"), batch([9, 4])
    prepack_weights(model, 2048)
    found = packed_forward(model, tokens)
    found.sum().backward()
    assert all(expert.weight.grad is not None for layer in moe_layers(model) for expert in layer.experts)
    with record_routing(model) as tape:
        states(model, tokens)
    assert [calls[0].experts.shape for calls in tape.layers] == [(13, 1), (13, 1)]
    assert not model.__dict__["_compiled"].takes(13)
    with torch.inference_mode():
        assert model.__dict__["_compiled"].takes(13)
        assert not CompiledEncoder(model.train()).takes(13)


def test_what_it_does_not_compute_is_left_to_torch(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Other(nn.Linear):
        """An adapter's layer, say."""

    def changed(change: Callable[[Any], Any]) -> Any:
        model = build(tiny_model_dir)
        change(model)
        return model

    def adapter(model: Any) -> None:
        model.encoder.layer[0].attention.self.query = Other(32, 32)

    assert can_compile(build(tiny_model_dir))
    assert not can_compile(build(tiny_model_dir).double())
    assert not can_compile(build(tiny_model_dir).bfloat16())
    assert not can_compile(changed(adapter))
    assert not can_compile(changed(hook))
    assert not can_compile(build(tiny_model_dir, "intermediate", num_experts_per_tok=2))
    assert not can_compile(build(write_tiny(tmp_path / "relu", "xlmr", hidden_act="relu")))
    assert not can_compile(build(write_tiny(tmp_path / "tanh", "xlmr", hidden_act="gelu_new")))
    assert not can_compile(build(write_tiny(tmp_path / "heads", "xlmr", num_attention_heads=4)))  # of 8
    assert not can_compile(build(write_tiny(tmp_path / "odd", "xlmr", intermediate_size=40)))


def test_tokens_outside_the_tables_are_an_error(tiny_model_dir: Path) -> None:
    model = build(tiny_model_dir)
    prepack_weights(model, 2048)
    vocabulary, longest = model.config.vocab_size, model.config.max_position_embeddings
    for row in ([5, vocabulary], [5, -1], [5] * longest):
        with pytest.raises(IndexError):
            states(model, TokenBatch.from_lists([[5, 6], row]))
    assert states(model, TokenBatch.from_lists([[5] * (longest - 2)])).isfinite().all()


def test_wide_processors_use_it_for_few_rows(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512, where oneDNN's products of many rows are measured and these are not."""
    monkeypatch.setattr(kernels, "vector_lanes", lambda: 16)
    model = build(tiny_model_dir)
    prepack_weights(model, 2048)
    with torch.inference_mode():
        assert [model.__dict__["_compiled"].takes(n) for n in (1, FEW_ROWS, FEW_ROWS + 1)] == [True, True, False]
    few, many = batch([20, 7]), batch(LENGTHS)
    for tokens in (few, many):
        torch.testing.assert_close(states(model, tokens).double(), in_float64(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_text_gets_the_same_bits_as_many_and_starts_no_thread(
    tiny_model_dir: Path, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder(EncoderArguments(encoder=str(tiny_model_dir), device="cpu", pooling_method=pooling))
    texts = [f"text {'word ' * (n % 40)}{n}" for n in range(60)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = encode_texts(encoder, texts, 100)
        monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail(f"a thread was started: {self}"))
        for number in (0, 7, 59):
            assert (encode_texts(encoder, [texts[number]], 100)[0] == many[number]).all()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
