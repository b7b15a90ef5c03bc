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
    "FlagReranker": "FlagEmbedding.inference.reranker",
    "FlagAutoModel": "FlagEmbedding.inference.auto",
    "FlagAutoReranker": "FlagEmbedding.inference.auto",
}
# What upstream 1.4.2 exports besides.
_UPSTREAM = {
    "AbsEmbedder", "AbsReranker", "EmbedderModelClass", "FlagICLModel", "FlagLLMModel", "FlagLLMReranker",
    "FlagPseudoMoEModel", "LayerWiseFlagLLMReranker", "LightWeightFlagLLMReranker", "RerankerModelClass",
}  # fmt: skip

__all__ = [
    "BGEM3FlagModel",
    "BGEM3ForInference",
    "BGEM3Model",
    "FlagAutoModel",
    "FlagAutoReranker",
    "FlagModel",
    "FlagReranker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _UPSTREAM:
        raise ImportError(
            f"this FlagEmbedding ({__version__}) has no {name}: it is a fork that fine-tunes and runs encoders, with "
            f"{', '.join(sorted(_PUBLIC))}; for {name} install upstream into an environment of its own: "
            "pip install FlagEmbedding==1.4.2",
            name=__name__,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
