"""What a base model consists of, whichever source it comes from: sizes, vocabulary, normalization rules, tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"

# XLM-R counts positions from pad_id + 1, BERT from 0: so many rows stand before the first position that is used.
FIRST_POSITION = 2

# Ids 0 to 3 of every XLM-R vocabulary; "<mask>" is the last id.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Sizes:
    """The numbers of XLM-R's configuration, under its names; positions count those before the first that is used."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float


class BaseSource(Protocol):
    """A model to take parts from. Tensor names and shapes are XLM-R's."""

    origin: str  # where it comes from, for people and for the record
    digest: str  # sha256 of the weights file
    sizes: Sizes
    pieces: list[tuple[str, float]]  # unigram vocabulary in order of ids: piece, log probability

    def charsmap(self) -> bytes:
        """The normalization rules as SentencePiece compiles them (``precompiled_charsmap``)."""

    def tensor(self, name: str, rows: list[int] | None = None) -> Floats:
        """A tensor by its name in an XLM-R state dict, float32; of ``rows`` only, where given."""


def in_xlmr_layout(name: str, values: Floats, rows: list[int] | None, is_bert: bool) -> Floats:
    """A tensor as XLM-R has it: BERT's positions moved to ``FIRST_POSITION``, one segment; of ``rows`` where given."""
    if name == POSITIONS and is_bert:
        values = np.concatenate([np.zeros((FIRST_POSITION, values.shape[1]), np.float32), values])
    if name == TYPES:
        values = values[:1]
    return values if rows is None else values[rows]


def tensor_names(layers: int) -> list[str]:
    """All tensors of an XLM-R encoder of ``layers`` layers without pooler, in the model's order."""
    names = [WORDS, POSITIONS, TYPES, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
    for layer in range(layers):
        for part in LAYER_PARTS.values():
            names += [f"encoder.layer.{layer}.{part}.weight", f"encoder.layer.{layer}.{part}.bias"]
    return names


# The packed file's short name of each part of a layer -> XLM-R's.
LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
