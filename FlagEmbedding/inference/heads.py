"""Whether a checkpoint has the heads that a mode needs: asked of its files, before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.modeling.heads import HEAD_FILES
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.modes import HEADS, Part


def with_heads(options: EncoderArguments, parts: Sequence[Part], flag: str = "--modes") -> EncoderArguments:
    """``options`` that load the heads where one of ``parts`` needs one.

    Raises:
        UsageError: the checkpoint has no such head.
    """
    needed = [part for part in HEADS if part in parts]
    if not needed:
        return options
    folder = resolve_folder(options.encoder, cache_dir=options.cache_dir)
    for part in needed:
        if not (folder / HEAD_FILES[part]).is_file():
            raise UsageError(
                f"{flag} {part}: {options.encoder} has no {HEAD_FILES[part]}: leave {part} out, or train the "
                "checkpoint with --unified_finetuning True"
            )
    return replace(options, heads=True)
