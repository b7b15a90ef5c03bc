"""How long an input may be: what the position table of an encoder allows."""

from __future__ import annotations

from transformers import PreTrainedConfig

# These count positions from the padding id on, and so lose the places below it.
_OFFSET_TYPES = ("xlm-roberta", "xlm-roberta-xl", "roberta", "camembert")


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that the position table allows, special tokens included; None where a configuration names no table."""
    places = getattr(config, "max_position_embeddings", None)
    if places is None:
        return None
    offset = int(config.pad_token_id or 0) + 1 if config.model_type in _OFFSET_TYPES else 0
    return int(places) - offset
