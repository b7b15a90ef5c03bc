"""How long an input may be: what the position table of an encoder allows."""

from __future__ import annotations

from torch import nn


def longest_input(backbone: nn.Module) -> int | None:
    """Tokens that the position table allows, special tokens included; None where the configuration names no table.

    A table with a padding index (RoBERTa's kind) counts positions from there on, and so loses the places below it.
    """
    places = getattr(backbone.config, "max_position_embeddings", None)
    if not isinstance(places, int) or places < 1:
        return None
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            return places if padding is None else places - padding - 1
    return places
