"""A base as transformers saves it, and checkpoints trained from it as our trainer saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.interchange import Instructions
from FlagEmbedding.modeling.moe import MoEConfig

Make = Callable[..., Path]


def move(model: nn.Module, seed: int) -> None:
    """Move every weight a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture(scope="session")
def tuned(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``tuned(seed, moe=…, heads=…, dtype=…, pooling=…, query=…)``: a folder trained from the tiny base, made once."""
    made: dict[str, Path] = {}

    def make(
        seed: int, *, experts: int = 0, heads: bool = False, dtype: torch.dtype = torch.float32, pooling: str = "mean",
        query: str = "query: ", source: Path = tiny_model_dir,
    ) -> Path:  # fmt: skip
        key = str((seed, experts, heads, dtype, pooling, query, source))
        if key not in made:
            moe = MoEConfig(moe="intermediate", num_experts=experts) if experts else None
            torch.manual_seed(seed)
            backbone = load_backbone(str(source), moe=moe)
            move(backbone, seed)
            linears = {"colbert_linear": nn.Linear(32, 16), "sparse_linear": nn.Linear(32, 1)} if heads else {}
            model = M3Encoder(
                backbone.to(dtype), **linears, pooling=pooling, instructions=Instructions(query, "passage: ")
            )
            made[key] = tmp_path_factory.mktemp("tuned") / f"tuned-{seed}"
            save_checkpoint(model, made[key], tokenizer=AutoTokenizer.from_pretrained(source))
        return made[key]

    return make
