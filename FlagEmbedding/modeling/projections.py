"""``Dense`` modules of sentence-transformers: linear layers between pooling and normalization, which train as well."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.utils.errors import DataError

_ACTIVATIONS = {
    f"torch.nn.modules.{where}.{name}": getattr(nn, name)
    for where, names in (("linear", ["Identity"]), ("activation", ["Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"]))
    for name in names
}
_NONE = "torch.nn.modules.linear.Identity"


class Projection(nn.Module):
    """A linear layer and its activation: ``[N, in]`` to ``[N, out]``.

    Args:
        said: ``in_features``, ``out_features``, ``bias`` and ``activation_function``, as in the module's config.json.
    """

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__()
        self.said = said
        self.linear = nn.Linear(said["in_features"], said["out_features"], bias=said["bias"])
        self.activation: nn.Module = _ACTIVATIONS[said["activation_function"]]()

    def forward(self, vectors: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, out]``."""
        return self.activation(self.linear(vectors))  # type: ignore[no-any-return]


def load_projections(folders: Sequence[Path], width: int) -> list[Projection]:
    """The modules in ``folders``, in order.

    Args:
        width: of the vectors that the first one reads.

    Raises:
        DataError: one of them computes something else, or does not fit the one before it.
    """
    projections = []
    for folder in folders:
        projection = Projection(_read_config(folder, width))
        try:
            projection.load_state_dict(_read_weights(folder))
        except RuntimeError as error:
            raise DataError(f"{folder}: the weights do not fit config.json: {first_line(error)}") from error
        projections.append(projection)
        width = projection.linear.out_features
    return projections


def _read_config(folder: Path, width: int) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] = {"in_features": int(said["in_features"]), "out_features": int(said["out_features"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not describe a Dense module: {first_line(error)}") from error
    found |= {"bias": said.get("bias", True), "activation_function": said.get("activation_function") or _NONE}
    if found["activation_function"] not in _ACTIVATIONS:
        known = ", ".join(name.rpartition(".")[2] for name in _ACTIVATIONS)
        raise DataError(f"{path}: activation {found['activation_function']!r} is not computed here (known: {known})")
    if said.get("use_residual") or any(
        said.get(name, "sentence_embedding") not in (None, "sentence_embedding")
        for name in ("module_input_name", "module_output_name")
    ):
        raise DataError(f"{path}: a Dense module with a residual or over token states is not computed here")
    if found["in_features"] != width:
        raise DataError(f"{path} reads vectors of {found['in_features']} dimensions, it gets {width}")
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / "model.safetensors").is_file():
            return load_file(folder / "model.safetensors")
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(f"{folder}: the weights of this Dense module cannot be read: {first_line(error)}") from error
