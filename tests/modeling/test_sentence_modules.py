"""What sentence-transformers' files say is computed as it computes it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from FlagEmbedding import FlagModel
from FlagEmbedding.modeling.interchange import Instructions, read_modules
from FlagEmbedding.utils.errors import DataError, UserError


def modules() -> Any:
    """sentence-transformers' modules, wherever its version keeps them."""
    from sentence_transformers import models

    return models


def made_by_them(base: Path, folder: Path, pooling: str, activation: nn.Module | None, normalize: bool) -> Path:
    """A folder that sentence-transformers saved."""
    models = modules()
    transformer = models.Transformer(str(base), max_seq_length=64)
    chain: list[nn.Module] = [transformer, models.Pooling(32, pooling_mode=pooling)]
    torch.manual_seed(4)
    if activation is not None:
        chain += [models.Dense(32, 48, activation_function=activation), models.Dense(48, 20, bias=False)]
    chain += [models.Normalize()] * normalize
    prompts = {"query": "Q: ", "document": "P: "}
    SentenceTransformer(modules=chain, prompts=prompts, device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize(
    ("pooling", "activation", "normalize"),
    [("cls", None, True), ("mean", nn.Tanh(), True), ("lasttoken", nn.Identity(), False), ("mean", nn.GELU(), True)],
)
def test_their_folder_gives_their_vectors(
    pooling: str, activation: nn.Module | None, normalize: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = made_by_them(tiny_model_dir, tmp_path / "theirs", pooling, activation, normalize)
    theirs = SentenceTransformer(str(folder), device="cpu")
    ours = FlagModel(str(folder), normalize_embeddings=normalize)
    np.testing.assert_allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(ours.encode_corpus(TEXTS), theirs.encode_document(TEXTS), atol=1e-5)
    assert read_modules(folder).normalize is normalize


@pytest.mark.parametrize(("pooling", "dense"), [("mean", True), ("last_token", False), ("cls", True)])
def test_our_checkpoint_gives_our_vectors_there(
    pooling: str, dense: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint
    from FlagEmbedding.modeling.encoder import M3Encoder
    from FlagEmbedding.modeling.projections import Projection

    said = {
        "in_features": 32,
        "out_features": 20,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    encoder = M3Encoder(
        load_backbone(tiny_model_dir), pooling=pooling, projections=[Projection(said)] * dense,
        instructions=Instructions("Q: ", None),
    )  # fmt: skip
    save_checkpoint(encoder, tmp_path, tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir))
    theirs, ours = SentenceTransformer(str(tmp_path), device="cpu"), FlagModel(str(tmp_path))
    assert ours.encode(TEXTS).shape == (len(TEXTS), 20 if dense else 32)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), ours.encode_queries(TEXTS), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), ours.encode(TEXTS), atol=1e-5)
    assert np.abs(ours.encode_queries(TEXTS) - ours.encode(TEXTS)).max() > 1e-3


def entries(*kinds: str) -> list[dict[str, str]]:
    return [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""}
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": entries("Transformer", "Pooling", "LSTM")}, "the module 'sentence_transformers.models.LSTM'"),
        ({"modules.json": entries("Transformer", "Normalize", "Pooling")}, "got Transformer, Normalize, Pooling"),
        ({"modules.json": entries("Transformer")}, "in this order, got Transformer"),
        ({"modules.json": [{"type": "custom_st.Transformer", "path": ""}]}, "names the module 'custom_st.Transformer'"),
        ({"modules.json": {"0": "Transformer"}}, "expected a list of modules"),
        ({"modules.json": [{**entries("Transformer")[0], "path": "0_Transformer"}, *entries("", "Pooling")[1:]]},
         "in the folder itself"),
        ({"modules.json": entries("Transformer", "Pooling")}, "1_Pooling lacks the config.json"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling by max_tokens is not computed here"),
        ({"1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "pooling by cls and mean is not computed"),
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": False}}, "pooling by nothing"),
        ({"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt false"),
        ({"config_sentence_transformers.json": {"prompts": {"query": 3}}}, "prompts: expected texts by name"),
        ({"config_sentence_transformers.json": "{"}, "is no JSON"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_modules(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, Instructions(None, None)),
        ({"prompts": {"query": "", "document": ""}}, Instructions(None, None)),
        ({"prompts": {"query": "q", "corpus": "c", "passage": "p"}}, Instructions("q", "p")),
        ({"prompts": {"web": "w", "query": "q"}, "default_prompt_name": "web"}, Instructions("q", "w")),
        (
            {"prompts": {"web": "w", "query": "", "document": ""}, "default_prompt_name": "web"},
            Instructions(None, None),
        ),
    ],
)
def test_prompts_are_those_that_they_would_use(said: dict[str, Any], expected: Instructions, tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    assert read_modules(tmp_path).instructions == expected


def changed(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "2_Dense/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def narrowed(folder: Path) -> None:
    state = load_file(folder / "2_Dense/model.safetensors")
    state["linear.weight"] = state["linear.weight"][:7].contiguous()
    save_file(state, folder / "2_Dense/model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(activation_function="torch.nn.modules.activation.RReLU"), "activation .* is not computed here"),
        (changed(in_features=31), "reads vectors of 31 dimensions, it gets 32"),
        (changed(use_residual=True), "with a residual or over token states"),
        (changed(module_input_name="token_embeddings"), "with a residual or over token states"),
        (changed(out_features=None), "does not describe a Dense module"),
        (narrowed, "the weights do not fit config.json"),
        (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "weights of this Dense module cannot be read"),
    ],
)
def test_a_dense_module_that_does_not_fit_is_refused(
    damage: Any, message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "modules.json").write_text(json.dumps(entries("Transformer", "Pooling", "Dense")))
    for name, content in (("1_Pooling", {"pooling_mode": "mean"}), ("2_Dense", {"in_features": 32, "out_features": 9})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    save_file(
        {"linear.weight": torch.zeros(9, 32), "linear.bias": torch.zeros(9)}, folder / "2_Dense/model.safetensors"
    )
    assert FlagModel(str(folder), normalize_embeddings=False).encode(TEXTS).shape == (len(TEXTS), 9)
    damage(folder)
    with pytest.raises(UserError, match=message):
        FlagModel(str(folder))
