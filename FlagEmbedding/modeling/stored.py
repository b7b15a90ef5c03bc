"""A checkpoint's tensors by name, read one at a time from its files: no model is built (but of an adapter)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.files import first_line, weight_files
from FlagEmbedding.utils.adapter_folder import is_adapter
from FlagEmbedding.utils.errors import DataError


class StoredTensors:
    """The tensors in a checkpoint folder, by the encoder's bare names (a prefix such as ``roberta.`` may be there).

    Attributes:
        dtype: of the first floating-point tensor, by name.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        if is_adapter(folder):  # whose tensors are there once it is merged
            state = load_backbone(folder).state_dict()
            self._files = dict.fromkeys(state, state)
        for file in [] if self._files else weight_files(folder):
            try:
                opened = _open(file)
            except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                raise DataError(f"{file} cannot be read as weights: {first_line(error)}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)
        self._bare = {key.partition(".")[2]: key for key in self._files}
        floating = (tensor for key in sorted(self._files) if (tensor := self._read(key)).is_floating_point())
        self.dtype: torch.dtype = next((tensor.dtype for tensor in floating), torch.float32)

    def _read(self, key: str) -> Tensor:
        file = self._files[key]
        return file[key] if isinstance(file, dict) else file.get_tensor(key)  # type: ignore[no-any-return]

    def get(self, *names: str) -> Tensor:
        """The first of ``names`` that is there. Raises ``DataError`` where none is."""
        for name in names:
            key = name if name in self._files else self._bare.get(name)
            if key is not None:
                return self._read(key)
        raise DataError(f"{self.folder} lacks {names[0]}")


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safe_open(file, framework="pt")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file of before torch 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)
