"""A tiny checkpoint with BGE-M3's two heads, and the places that options name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny
from hub_cache import keep

LOUD = """
from transformers import PreTrainedTokenizerFast
class LoudTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **settings):
        return super().__call__([each.upper() for each in text], **settings)
"""


@pytest.fixture(scope="session")
def tiny_heads_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny XLM-R with random heads saved as upstream saves them; colbert vectors of width 16."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-m3"
    shutil.copytree(tiny_model_dir, folder)
    torch.manual_seed(5)
    torch.save(torch.nn.Linear(32, 16).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


@pytest.fixture(scope="session")
def places(
    tiny_model_dir: Path, tiny_heads_dir: Path, tiny_moe_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints and hubs that the cases name; ``loud`` has a tokenizer of its own code, in upper case."""
    root = tmp_path_factory.mktemp("options")
    found = {"model": tiny_model_dir, "heads": tiny_heads_dir, "moe": tiny_moe_dir}
    found["other"] = write_tiny(root / "other", "xlmr", initializer_range=0.3)
    for hub, source in (("hub_a", tiny_heads_dir), ("hub_b", found["other"])):
        found[hub] = keep(root / hub, "org/tiny", source)
    found["loud"] = Path(shutil.copytree(tiny_heads_dir, root / "loud"))
    (found["loud"] / "tokenization_loud.py").write_text(LOUD)
    settings = json.loads((found["loud"] / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_loud.LoudTokenizer"]}
    (found["loud"] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


@pytest.fixture
def close() -> Iterator[list[Any]]:
    """Worker processes to be stopped after the test."""
    encoders: list[Any] = []
    yield encoders
    for encoder in encoders:
        encoder.pool.close()
