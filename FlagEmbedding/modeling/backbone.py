"""Checkpoints: load an encoder (dense or with experts), turn dense layers into experts, choose what trains, save.

A checkpoint describes itself: ``config.json`` says whether and where there are experts, and loading needs its path and
no flag. Nothing is initialised at random in silence: a weight that is missing or left over is an error. Loading never
runs code out of a checkpoint; the classes are transformers' own and ours.

The only module that knows the key names of a state dict.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from FlagEmbedding.modeling.moe import PLACES, MoEConfig, MoELinear
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import encoder_with_experts, expert_places
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

PathLike = str | os.PathLike[str]
MOE_FIELDS = ("moe", "num_experts", "num_experts_per_tok", "only_train")
_EXPERT_KEY = re.compile(r"encoder\.layer\.\d+\.(intermediate|output)\.dense\.experts\.(\d+)\.")
# What a hub snapshot needs; the rest of a repository (ONNX, images) may be gigabytes.
_SNAPSHOT = ["*.json", "*.safetensors", "*.model", "*.txt", "*_linear.pt", "1_Pooling/*"]


# ---- finding and reading ----


def resolve_folder(name_or_path: PathLike, *, cache_dir: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or the snapshot of a hub id (downloaded where needed).

    Raises:
        UsageError: neither a folder nor a repository that can be reached.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no checkpoint: it holds no config.json")
        return folder
    name = str(name_or_path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"{name} is neither a checkpoint folder nor a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = Path(snapshot_download(name, cache_dir=cache_dir, revision=revision, allow_patterns=_SNAPSHOT))
        if not list(found.glob("*.safetensors")):
            # Older repositories, BAAI/bge-m3 among them, hold a pickle alone; it is read with weights_only.
            found = Path(
                snapshot_download(
                    name, cache_dir=cache_dir, revision=revision, allow_patterns=[*_SNAPSHOT, "pytorch_model*.bin"]
                )
            )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise UsageError(
            f"{name} is not a folder here, and the hub did not give a repository of that name "
            f"({type(error).__name__}): check the name, or download it first and give the folder"
        ) from error
    return found


def load_config(
    name_or_path: PathLike, *, cache_dir: str | None = None, revision: str | None = None
) -> PreTrainedConfig:
    """The configuration of a checkpoint folder or hub id, expert fields included."""
    folder = resolve_folder(name_or_path, cache_dir=cache_dir, revision=revision)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / 'config.json'} is no configuration that transformers knows: {_line(error)}") from error


def stored_experts(config: PreTrainedConfig, source: PathLike) -> MoEConfig | None:
    """The experts that a configuration describes; None for a dense encoder. ``source`` is named in errors."""
    if getattr(config, "moe", None) is None:
        return None
    missing = [name for name in ("num_experts", "num_experts_per_tok") if getattr(config, name, None) is None]
    if missing:
        raise DataError(f"{source}/config.json says moe {config.moe!r} but lacks {' and '.join(missing)}")
    try:
        return MoEConfig(
            moe=config.moe, num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok
        )
    except UsageError as error:
        raise DataError(f"{source}/config.json: {error}") from error


def weight_keys(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint folder, without reading the tensors."""
    keys: set[str] = set()
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                keys |= set(stream.keys())
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} cannot be read as safetensors: {_line(error)}") from error
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        for file in files:
            keys |= set(torch.load(file, map_location="meta", weights_only=True))
    if not files:
        raise DataError(f"{folder} holds no weights: expected model.safetensors (or shards of it) or pytorch_model.bin")
    return keys


# ---- loading ----


def load_backbone(
    name_or_path: PathLike,
    *,
    moe: MoEConfig | None = None,
    config: PreTrainedConfig | PathLike | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> PreTrainedModel:
    """An encoder without pooler, exactly as stored; a dense one becomes a mixture of experts where ``moe`` says so.

    Args:
        name_or_path: checkpoint folder or hub id.
        moe: experts asked for, and how the router learns. On a checkpoint that has experts, ``moe.moe`` None or equal
            settings load it as it is (one expert a layer, the default, counts as not said).
        config: another configuration than the checkpoint's; where the experts are is always the checkpoint's word.
        dtype: dtype of the parameters.

    Raises:
        UsageError: ``moe`` contradicts the checkpoint, or the encoder has no such layers.
        DataError: the weights do not fit the configuration.
    """
    folder = resolve_folder(name_or_path, cache_dir=cache_dir, revision=revision)
    own = load_config(folder)
    stored = stored_experts(own, folder)
    asked = moe or MoEConfig()
    if stored is not None:
        _refuse_contradiction(asked, stored, folder)
    _check_expert_keys(stored, weight_keys(folder), folder)
    if config is None:
        config = own
    elif isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        config = load_config(config)
    for name in MOE_FIELDS:
        if stored is not None:
            setattr(config, name, getattr(own, name, None))
    model = _read_model(folder, config, stored is not None, dtype)
    if stored is None and asked.moe is not None:
        insert_experts(model, asked)
    for layer in moe_layers(model):
        layer.router_gradient, layer.router_jitter = asked.router_gradient, asked.router_jitter
    return model


def _refuse_contradiction(asked: MoEConfig, stored: MoEConfig, folder: Path) -> None:
    if asked.moe is None:
        return
    counts = (asked.num_experts, asked.num_experts_per_tok)
    if asked.moe == stored.moe and counts in ((1, 1), (stored.num_experts, stored.num_experts_per_tok)):
        return
    raise UsageError(
        f"--moe {asked.moe} with {counts[0]} experts, {counts[1]} per token, contradicts {folder}, which has "
        f"{stored.num_experts} experts in {stored.moe}, {stored.num_experts_per_tok} per token: leave --moe out, the "
        "checkpoint says it itself"
    )


def _check_expert_keys(stored: MoEConfig | None, keys: set[str], folder: Path) -> None:
    found = {match.groups() for key in keys if (match := _EXPERT_KEY.search(key))}
    places, count = {place for place, _ in found}, len({number for _, number in found})
    if stored is None and found:
        raise DataError(
            f"{folder} holds weights of {count} experts in {' and '.join(sorted(places))}, but its config.json does not "
            "say so: it needs moe, num_experts and num_experts_per_tok"
        )
    if stored is not None and (places != {stored.moe} or count != stored.num_experts):
        has = f"weights of {count} experts in {' and '.join(sorted(places))}" if found else "weights of dense layers"
        raise DataError(
            f"{folder}/config.json says {stored.num_experts} experts in {stored.moe}, but the folder holds {has}"
        )


def _read_model(folder: Path, config: PreTrainedConfig, experts: bool, dtype: torch.dtype) -> PreTrainedModel:
    base = MODEL_MAPPING.get(type(config), None)
    base = base[0] if isinstance(base, list | tuple) else base
    if base is None:
        raise UsageError(f"{folder} holds a {config.model_type!r} model, for which transformers has no encoder")
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(base.__init__).parameters else {}
    config.transformers_weights = None  # see interchange.GUARD
    cls = encoder_with_experts(base, MoELinear) if experts else base
    try:
        model, info = cls.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True, **pooler)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: the weights do not fit config.json: {_line(error)}") from error
    missing = sorted(info["missing_keys"])
    # Heads of other tasks and the pooler are no part of the encoder.
    unexpected = sorted(key for key in info["unexpected_keys"] if re.match(r"(\w+\.)?(encoder|embeddings)\.", key))
    for what, keys in (("lacks", missing), ("holds, beyond what config.json describes,", unexpected)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise DataError(f"{folder} {what} {keys[0]}{more}: nothing is initialised at random, give a whole checkpoint")
    return model.eval()


def insert_experts(model: PreTrainedModel, config: MoEConfig) -> None:
    """Put ``config.num_experts`` copies and a new gate in the place of each dense layer, and note it in the config.

    Raises:
        UsageError: the encoder has no ``encoder.layer.*.{intermediate,output}.dense``.
    """
    assert config.moe is not None
    try:
        places = expert_places(model, config.moe)
        fits = all(isinstance(place.dense, nn.Linear) for place in places)
    except AttributeError:
        fits = False
    if not fits:
        raise UsageError(
            f"--moe {config.moe} needs an encoder with encoder.layer.*.{config.moe}.dense (XLM-R, RoBERTa, BERT …), "
            f"got {type(model).__name__}"
        )
    for place in places:
        place.dense = MoELinear.from_linear(place.dense, config)  # type: ignore[arg-type]
    for name in MOE_FIELDS:
        setattr(model.config, name, getattr(config, name))


def moe_layers(model: nn.Module) -> list[MoELinear]:
    """The MoE layers of a model, in the order of the encoder; none for a dense one."""
    return [module for module in model.modules() if isinstance(module, MoELinear)]


def _line(error: BaseException) -> str:
    """An exception's first line, for a message of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
