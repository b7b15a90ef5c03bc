"""The places that options name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny
from hub_cache import keep

LOUD = """
from transformers import PreTrainedTokenizerFast
class LoudTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **settings):
        return super().__call__([each.upper() for each in text], **settings)
"""


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
