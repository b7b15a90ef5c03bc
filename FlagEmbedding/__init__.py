"""FlagEmbedding: fine-tune BGE-M3 with the Contrastive Learning Penalty and upcycled experts.

A fork under upstream's name. Importing the package is light: it reads no model library and touches
no network; the public classes are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "1.4.2.post1"

_PUBLIC = {
    "BGEM3Model": "FlagEmbedding.finetune.biencoder",
    "BGEM3ForInference": "FlagEmbedding.inference.m3",
    "FlagModel": "FlagEmbedding.inference.embedder",
    "BGEM3FlagModel": "FlagEmbedding.inference.embedder",
}

__all__ = ["BGEM3FlagModel", "BGEM3ForInference", "BGEM3Model", "FlagModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
