"""A model in memory as an encoder: bit by bit the vectors of its saved checkpoint, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS

from FlagEmbedding.finetune.biencoder import BGEM3Model
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.live_encoder import LiveEncoder
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.inference.tokenization import tokenize
from FlagEmbedding.modeling.projections import Projection


def with_dense(folder: Path, tmp_path: Path) -> Path:
    """A copy of ``folder`` whose vectors go through a Dense module of 32 to 8."""
    from FlagEmbedding.modeling.backbone import save_checkpoint

    model = BGEM3Model(str(folder), unified_finetuning=False, sentence_pooling_method="mean")
    said = {"in_features": 32, "out_features": 8, "bias": True}
    torch.manual_seed(5)
    model.projections.append(Projection({**said, "activation_function": "torch.nn.modules.activation.Tanh"}))
    save_checkpoint(model, tmp_path / "dense", tokenizer=model.tokenizer)
    return tmp_path / "dense"


@pytest.mark.parametrize("kind", ["plain", "experts", "dense", "bf16", "not normalized"])
def test_its_vectors_are_those_of_the_saved_checkpoint(
    kind: str, tiny_dropout_dir: Path, tiny_moe_dir: Path, tmp_path: Path
) -> None:
    folder = {"experts": tiny_moe_dir}.get(kind, tiny_dropout_dir)
    if kind == "dense":
        folder = with_dense(folder, tmp_path)
    normalize = kind != "not normalized"
    model = BGEM3Model(str(folder), unified_finetuning=False, normlized=normalize).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = EncoderArguments(
        encoder=str(tmp_path / "saved"), normalize_embeddings=normalize, dtype="bf16" if kind == "bf16" else None
    )
    live = LiveEncoder(model, model.tokenizer, options)
    vectors = live.encode_rows(tokenize(model.tokenizer, TEXTS, 64), 64).float().numpy()
    model.save(str(tmp_path / "saved"))
    saved = TextEncoder(options)
    assert np.array_equal(vectors, encode_texts(saved, TEXTS, 64))
    assert live.hidden_size == saved.hidden_size == (8 if kind == "dense" else 32)
    assert all(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
