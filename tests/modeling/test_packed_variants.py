"""The packed engine on configurations that differ from the usual one in a single fact, and what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_tiny
from torch import Tensor, nn
from transformers import AutoModel

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.modeling.options import EngineConfig
from FlagEmbedding.modeling.packed import packed_forward
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.tokens import TokenBatch, offsets

pytestmark = pytest.mark.numeric

LENGTHS = [17, 3, 9, 9, 5, 1]
VARIANTS = {
    "two token types": ("bert", {"type_vocab_size": 2}),
    "great epsilon": ("xlmr", {"layer_norm_eps": 0.3}),
    "tanh GELU": ("xlmr", {"hidden_act": "gelu_new"}),
    "ReLU": ("bert", {"hidden_act": "relu"}),
    "heads of 8": ("xlmr", {"num_attention_heads": 4}),  # which the compiled kernels leave to torch's operators
    "one head": ("roberta", {"num_attention_heads": 1}),
    "another padding id": ("xlmr", {"pad_token_id": 3}),
    "no layers": ("xlmr", {"num_hidden_layers": 0}),
}


def batch(lengths: list[int]) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return TokenBatch.from_lists([torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths])


def reference(model: nn.Module, tokens: TokenBatch) -> Tensor:
    """Sequence by sequence through transformers' own forward: ``[T, D]``."""
    pieces = tokens.ids.split(tokens.lengths)
    return torch.cat([model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])[0][0] for ids in pieces])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trains", [False, True])
def test_states_equal_transformers(variant: str, trains: bool, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    model = AutoModel.from_pretrained(write_tiny(tmp_path / "model", kind, **changes), add_pooling_layer=False)
    with torch.no_grad():  # random weights leave biases at 0 and norms at 1, where mistakes do not show
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    tokens = batch(LENGTHS)
    with torch.set_grad_enabled(trains):
        expected = reference(model.train(trains), tokens)
        torch.testing.assert_close(packed_forward(model, tokens), expected, rtol=2e-5, atol=2e-5)
        first = packed_forward(model, tokens, first_tokens_only=True)
    torch.testing.assert_close(first, expected[offsets(tokens.lengths)[:-1]], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("moe", [None, MoEConfig(moe="intermediate", num_experts=2)])
def test_gradient_checkpointing_keeps_one_matrix_per_layer(tiny_dropout_dir: Path, moe: MoEConfig | None) -> None:
    model = load_backbone(tiny_dropout_dir, moe=moe).train()
    tokens = batch([20] * 20)
    kept = {}
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            packed_forward(model, tokens)
        kept[on] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]


def test_a_batch_of_several_slabs_looks_its_words_up_once(tiny_model_dir: Path) -> None:
    """Each lookup of the vocabulary costs a gradient of the size of the vocabulary."""
    encoder = M3Encoder(load_backbone(tiny_model_dir), engine=EngineConfig(slab_tokens=20)).train()
    looked_up: list[int] = []
    encoder.model.embeddings.word_embeddings.register_forward_hook(lambda _, ids, __: looked_up.append(len(ids[0])))
    tokens = batch([9, 9, 9, 9, 9])
    encoder.encode([tokens], [{"dense"}])
    assert looked_up == [len(set(tokens.ids.tolist()))]


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_roles_that_want_less_come_first(engine: str, tiny_model_dir: Path) -> None:
    """The results have the order of the roles, whatever each of them wants."""
    torch.manual_seed(0)
    encoder = M3Encoder(
        load_backbone(tiny_model_dir), nn.Linear(32, 8), nn.Linear(32, 1), engine=EngineConfig(engine)
    ).eval()
    roles = [batch([5, 9]), batch([7, 3, 4]), batch([6])]
    wants = [{"dense"}, {"dense", "sparse", "colbert"}, {"sparse"}]
    with torch.no_grad():
        together = encoder.encode(roles, wants)
        alone = [encoder.encode([role], [want])[0] for role, want in zip(roles, wants, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        assert found.tokens.lengths == expected.tokens.lengths
        for kind in ("dense", "token_weights", "colbert"):
            ours, theirs = getattr(found, kind), getattr(expected, kind)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "sizes"), [(511, [18]), (512, [16, 2])])
def test_the_sub_batch_begins_at_the_length_of_the_table(length: int, sizes: list[int], tiny_model_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), engine=EngineConfig("padded")).eval()
    seen: list[int] = []
    encoder.model.embeddings.register_forward_hook(lambda _, __, output: seen.append(len(output)))
    tokens = batch([4] * 18)
    with torch.no_grad():
        encoder.encode([TokenBatch(tokens.ids, tokens.lengths, length)], [{"dense"}])
    assert seen == sizes


@pytest.mark.parametrize(("kind", "longest"), [("xlmr", 128), ("roberta", 128), ("bert", 130)])
def test_the_longest_input_is_the_last_that_the_position_table_holds(kind: str, longest: int, tmp_path: Path) -> None:
    model = load_backbone(write_tiny(tmp_path / "model", kind)).eval()
    assert longest_input(model) == longest
    with torch.no_grad():
        assert packed_forward(model, batch([longest])).isfinite().all()
        with pytest.raises(IndexError):
            packed_forward(model, batch([longest + 1]))


def test_all_rows_are_computed_where_a_router_loss_reads_them(tiny_moe_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_moe_dir)).train()
    rows: list[int] = []
    encoder.model.encoder.layer[-1].output.LayerNorm.register_forward_hook(lambda _, x, __: rows.append(len(x[0])))
    for encoder.all_rows in (False, True):
        encoder.encode([batch([5, 9])], [{"dense"}])
    assert rows == [2, 14]
