"""A folder's weights into transformers' encoder: nothing is initialized at random in silence, nothing is left over."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.modeling.moe import trainable_class
from FlagEmbedding.utils.errors import DataError, UsageError

# Heads of other tasks and the pooler are no part of the encoder; position_ids is a constant that old versions stored.
_BACKBONE_KEY = re.compile(r"(\w+\.)?(encoder|embeddings)\.(?!position_ids$)")
POOLER_KEY = re.compile(r"(^|\.)pooler\.")


def read_model(folder: Path, config: PreTrainedConfig, experts: bool, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder in ``folder``, in evaluation mode, every weight as stored.

    Args:
        experts: it has experts, as ``config`` says.

    Raises:
        DataError: weights are missing, left over, or do not fit.
        UsageError: transformers has no such encoder here.
    """
    base: Any = _encoder_class(config, folder)
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(base).parameters else {}
    cls: Any = trainable_class(base) if experts else base
    try:
        with _quiet_transformers():
            model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True, **pooler)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: the weights do not fit config.json: {first_line(error)}") from error
    except Exception as error:  # transformers' own code for this class, which may raise anything
        raise UsageError(f"{folder}: {base.__name__} cannot be loaded: {first_line(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if not POOLER_KEY.search(key))
    own = {_any_layer(key) for key in model.state_dict()}
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if _BACKBONE_KEY.match(key) or {_any_layer(key), _any_layer(key.partition(".")[2])} & own
    )
    for what, keys in (("lacks", missing), ("holds, beyond what config.json describes,", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            hint = "nothing is initialized at random here, give a whole checkpoint"
            raise DataError(f"{folder} {what} {keys[0]}{more}: {hint}")
    # The loader leaves parameters inside the mapped file, wherever its header ends. Our own memory is aligned: the same
    # weights then give the same bits, whichever file they come from.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()  # type: ignore[no-any-return]


def _encoder_class(config: PreTrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """transformers' encoder for a configuration: of an encoder and a decoder the encoder, where it is one by itself."""
    try:
        found: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None) or MODEL_MAPPING.get(type(config), None)
    except Exception as error:  # a class whose own libraries are not installed
        raise UsageError(f"{folder} holds a {config.model_type!r} model: {first_line(error)}") from error
    base = found[0] if isinstance(found, tuple | list) else found
    if base is None:
        raise UsageError(f"{folder} holds a {config.model_type!r} model, for which transformers has no encoder")
    return base  # type: ignore[no-any-return]


def _any_layer(key: str) -> str:
    return re.sub(r"\d+", "N", key)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, no table of keys: what is missing or left over is checked here, and is an error."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
