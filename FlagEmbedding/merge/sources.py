"""The checkpoints that go in: what each says of itself, and whether their weights can be averaged at all.

An average means something only between models of one origin: the same layers, the same pieces, the same pooling. What a
folder leaves open (a plain base says nothing of pooling or instructions) the others decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from FlagEmbedding.modeling.backbone import stored_experts
from FlagEmbedding.modeling.files import load_config
from FlagEmbedding.modeling.interchange import NO_INSTRUCTIONS, StoredModules, read_modules
from FlagEmbedding.modeling.options import MoEConfig
from FlagEmbedding.modeling.tokenizer import load_tokenizer
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
T = TypeVar("T")

# What two encoders of one origin have in common; other fields do not decide what the weights compute.
_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "position_embedding_type"),
    "pad_token_id",
)
# Scripts and spellings that tokenizers of the same pieces may still treat differently.
_PROBES = ("How Far is 12.5 km?", "  서울은 한강을 끼고 있다", "رود کارون‌ کجاست؟", "गंगा नदी", "ﬁne Ｆｕｌｌ ① café")


@dataclass(frozen=True)
class Source:
    """A checkpoint: what the user called it, where it lies, and what it says of itself."""

    name: str
    folder: Path
    config: PreTrainedConfig
    experts: MoEConfig | None
    stored: StoredModules


def open_sources(names: Sequence[str], cache_dir: str | None = None) -> list[Source]:
    """The checkpoints, found to fit together.

    Raises:
        UserError: one cannot be read, or two differ in what cannot be averaged; one line says which and in what.
    """
    sources = []
    for name in names:
        folder = resolve_folder(name, cache_dir=cache_dir)
        config = load_config(folder)
        sources.append(Source(name, folder, config, stored_experts(config, folder), read_modules(folder)))
    for field in _FIELDS:
        agreed(sources, field, [getattr(source.config, field, None) for source in sources])
    agreed(sources, "experts", [_experts(source.experts) for source in sources])
    for what in ("pooling", "normalize"):
        agreed(sources, what, [getattr(source.stored, what) for source in sources])
    said = [None if each.stored.instructions == NO_INSTRUCTIONS else each.stored.instructions for each in sources]
    instructions = agreed(sources, "instructions", said)
    if instructions is not None and None in said:
        silent = sources[said.index(None)].name
        logger.info("%s names no instructions: taken to be those of the others (%s)", silent, instructions)
    agreed(sources, "Dense modules", [len(source.stored.dense) for source in sources])
    _check_tokenizers(sources)
    return sources


def agreed(sources: Sequence[Source], what: str, said: Sequence[T | None]) -> T | None:
    """What those sources say that say anything (None: nothing). Raises ``UsageError`` where two differ."""
    first: tuple[Source, T] | None = None
    for source, value in zip(sources, said, strict=True):
        if value is None:
            continue
        if first is None:
            first = source, value
        elif value != first[1]:
            raise UsageError(
                f"{first[0].name} and {source.name} cannot be averaged: {what} is {first[1]} there, {value} here; give "
                "checkpoints that were trained from one base in the same way"
            )
    return None if first is None else first[1]


def _experts(experts: MoEConfig | None) -> str | None:
    if experts is None:
        return None
    router = "" if experts.router == "learned" else f", router {experts.router}"
    return f"{experts.num_experts} in {experts.moe}, {experts.num_experts_per_tok} per token{router}"


def _check_tokenizers(sources: Sequence[Source]) -> None:
    first: Any = None
    for source in sources:
        tokenizer = load_tokenizer(source.folder)
        if first is None:
            first = tokenizer
        elif _ids(tokenizer) != _ids(first) or tokenizer.get_vocab() != first.get_vocab():
            raise UsageError(
                f"{sources[0].name} and {source.name} cannot be averaged: they have different tokenizers; give "
                "checkpoints that were trained from one base"
            )


def _ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in _PROBES]
