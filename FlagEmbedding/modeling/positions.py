"""How long an input may be: what the position table of an encoder allows."""

from __future__ import annotations

from transformers import PreTrainedConfig


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that the position table allows, special tokens included; None where a configuration names no table."""
    places = getattr(config, "max_position_embeddings", None)
    if places is None:
        return None
    # RoBERTa's kind counts positions from the padding id on, and so loses the places below it.
    offset = "roberta" in config.model_type or config.model_type == "camembert"
    return int(places) - (int(config.pad_token_id or 0) + 1 if offset else 0)
