"""Negatives that the model reads as it reads a positive of their row: other characters, the same token ids."""

from __future__ import annotations

from typing import Any

from FlagEmbedding.mining.common.jobs import progress
from FlagEmbedding.mining.doctor.arguments import ScoreSettings
from FlagEmbedding.mining.doctor.scan import Finding, Texts, short
from FlagEmbedding.utils.texts import text_key, text_keys


def find_token_twins(texts: Texts, tokenizer: Any, settings: ScoreSettings) -> Finding:
    """Those of the rows in ``texts``, cut as in training; what is the same text by its characters is not listed."""
    found, prefix = Finding(), settings.passage_instruction_for_retrieval or ""
    for row in progress("comparing tokens", texts.rows()):
        passages = [texts.text(number) for number in (*row.pos, *row.neg)]
        ids = tokenizer(
            [prefix + text for text in passages], truncation=True, max_length=settings.passage_max_len,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        count = len(row.pos)
        positives, keys = set(map(tuple, ids[:count])), text_keys(passages[:count])
        for i, (text, own) in enumerate(zip(passages[count:], ids[count:], strict=True)):
            if tuple(own) in positives and text_key(text) not in keys:
                found.add(f"{row.place}: neg[{i}] {short(text)}")
    return found
