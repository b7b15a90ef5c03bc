"""A checkpoint folder's files: its configuration and the names of its tensors.

Loading never runs code out of a checkpoint, and pickles are read with ``weights_only``.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.io import PathLike


def load_config(
    name_or_path: PathLike, *, cache_dir: str | None = None, revision: str | None = None
) -> PreTrainedConfig:
    """The configuration of a checkpoint folder or hub id, expert fields included."""
    folder = resolve_folder(name_or_path, cache_dir=cache_dir, revision=revision)
    folder = files_of(folder, "config.json", cache_dir=cache_dir)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}/config.json is nothing that transformers knows: {first_line(error)}") from error


def weight_keys(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint folder, without reading the tensors."""
    keys: set[str] = set()
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as stream:
                    keys |= set(stream.keys())
            else:
                keys |= set(torch.load(file, map_location="meta", weights_only=True))
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise DataError(f"{file} cannot be read as weights: {first_line(error)}") from error
    return keys


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors, found in the order in which transformers looks for them.

    Raises:
        DataError: there are none, or a shard is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise DataError(f"{folder} lacks {missing[0]}, one of {len(shards)} shards that {index.name} names")
            return [folder / shard for shard in shards]
    raise DataError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, whole or in shards")


def first_line(error: BaseException) -> str:
    """An exception's first line, for a message of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
