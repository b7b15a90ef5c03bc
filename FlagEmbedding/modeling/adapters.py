"""LoRA by PEFT: adapters put into a backbone, merged into its weights, written and read.

PEFT replaces a linear layer by one of its own that adds the adapter's product. The packed engine calls such a layer as
it is, whatever it fuses otherwise; with an adapter in an expert, each expert runs over its own tokens. So outputs and
gradients are PEFT's. Beside the adapters train the heads of unified fine-tuning and the gates of experts that have
adapters; everything else is frozen.

PEFT is imported where it is used: extra ``lora``.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from FlagEmbedding.modeling.adapter_options import LoraOptions
from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.modeling.moe import MoELinear
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import ADAPTER_CONFIG
from FlagEmbedding.utils.io import PathLike, follow_umask, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

FOLDER = "adapter"  # beside merged weights
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's keys
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_GATE = ".gate.weight"


@dataclass(frozen=True)
class AdapterSource:
    """How an adapter is saved: the base that it names, and whether without the merged weights."""

    base: str
    alone: bool


def require_peft(why: str) -> None:
    """Raise ``UsageError`` where PEFT is not installed."""
    if find_spec("peft") is None:
        raise UsageError(f"{why} needs PEFT: pip install 'FlagEmbedding[lora]'")


def has_adapters(model: nn.Module) -> bool:
    """True after :func:`add_adapters`, until they are merged."""
    return any("lora_A" in module._modules for module in model.modules())


# ---- training ----


def add_adapters(backbone: PreTrainedModel, options: LoraOptions, only_train: str | None = None) -> None:
    """Put an adapter into each linear layer that ``options`` name, and freeze the rest of the backbone.

    Args:
        only_train: ``intermediate`` or ``output``: of these layers only ``encoder.layer.*.{this}.dense``.

    Raises:
        UsageError: a name fits no linear layer, or no expert of a layer would get an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = targets(backbone, options.lora_target, only_train)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout,
        target_modules=names,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
    )
    inject_adapter_in_model(config, backbone)
    gates = _gates(backbone)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name in gates)
    said = f"{'DoRA' if options.use_dora else 'LoRA'} of rank {options.lora_r}, alpha {options.alpha}"
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    logger.info("%s in %d linear layers%s: %s parameters train", said, len(names),
                f", and {len(gates)} gates" if gates else "", f"{trained:,}")  # fmt: skip


def targets(backbone: nn.Module, wanted: Sequence[str], only_train: str | None = None) -> list[str]:
    """Names of the linear layers that get an adapter: of the encoder's layers, never gates."""
    every = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name) and not name.endswith(".gate")
    ]
    found: dict[str, None] = {}
    for target in wanted:
        fitting = [name for name in every if _fits(name, target.strip("."))]
        if not fitting:
            known = sorted({re.sub(r"\d+", "N", name) for name in every})
            raise UsageError(f"--lora_target {target}: no linear layer is called so; there are {', '.join(known)}")
        found |= dict.fromkeys(fitting)
    if only_train is not None:
        kept = re.compile(rf"encoder\.layer\.\d+\.{only_train}\.dense(\.|$)")
        found = {name: None for name in found if kept.match(name)}
        if not found:
            raise UsageError(
                f"--only_train {only_train} with --lora_target {' '.join(wanted)} leaves no layer for an adapter: say "
                "which layers by --lora_target alone"
            )
    return list(found)


def _fits(name: str, target: str) -> bool:
    if target in ("attention", "ffn"):
        return bool(_ATTENTION.search(name)) == (target == "attention")
    return target == "all" or f".{target}." in f".{name}."


def _gates(backbone: nn.Module) -> dict[str, Tensor]:
    """The gates of experts that have adapters, by parameter name; they are small, train in full and are saved."""
    return {
        f"{name}{_GATE}": module.gate.weight
        for name, module in backbone.named_modules()
        if isinstance(module, MoELinear) and module.router == "learned" and has_adapters(module)
    }


# ---- merging ----


def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The state of the encoder that this one is with its adapters merged; without adapters its own."""
    state: dict[str, Tensor] = backbone.state_dict()
    for name, layer in backbone.named_modules():
        if "lora_A" in layer._modules:
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in _merged(layer).state_dict().items()}
    return state


def merge_in_place(backbone: nn.Module) -> None:
    """Plain linear layers again, with the adapters in their weights; bit by bit those of :func:`merged_state`."""
    for name, layer in [*backbone.named_modules()]:
        if "lora_A" in layer._modules:
            backbone.set_submodule(name, _merged(layer))


def _merged(layer: Any) -> nn.Linear:
    own = copy.deepcopy(layer)
    with torch.no_grad():
        own.merge(safe_merge=True)
    return own.get_base_layer()  # type: ignore[no-any-return]


# ---- files ----


def write_adapter(backbone: Any, folder: Path, base: str) -> None:
    """PEFT's two files, for the base called ``base``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_state(backbone), folder / WEIGHTS, metadata={"format": "pt"})
    follow_umask(folder / WEIGHTS)
    config = copy.copy(backbone.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = "FEATURE_EXTRACTION"
    config.modules_to_save = ["gate"] if _gates(backbone) else None
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json_atomic(folder / ADAPTER_CONFIG, said)


def _state(backbone: Any) -> dict[str, Tensor]:
    """Adapters and gates by PEFT's keys."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(backbone, save_embedding_layers=False) | _gates(backbone)
    return {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}


def load_adapter_state(backbone: PreTrainedModel, folder: PathLike) -> None:
    """Put a checkpoint's adapters and gates into ``backbone``, which has such; for continuing a run exactly.

    Raises:
        DataError: the checkpoint does not hold exactly these.
    """
    from peft import set_peft_model_state_dict

    files = [Path(folder) / FOLDER / WEIGHTS, Path(folder) / WEIGHTS]
    file = next((each for each in files if each.is_file()), None)
    if file is None:
        raise DataError(f"{folder} holds no {WEIGHTS}, and the run trains adapters: it is another run's")
    try:
        stored, own = load_file(file), _state(backbone)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if {key: value.shape for key, value in stored.items()} != {key: value.shape for key, value in own.items()}:
        raise DataError(f"{file} holds other adapters than those being trained")
    stored = {key.removeprefix(_PREFIX): value for key, value in stored.items()}
    gates = _gates(backbone)
    set_peft_model_state_dict(backbone, {key: value for key, value in stored.items() if key not in gates})
    with torch.no_grad():
        for key, gate in gates.items():
            gate.copy_(stored[key])


def merge_adapter(backbone: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """``backbone`` with PEFT's adapter in ``folder`` merged into it.

    Args:
        backbone: the adapter's base, float32.
        dtype: of the result.

    Raises:
        UsageError: PEFT is not installed.
        DataError: the adapter cannot be read, does not fit the base, or cannot be merged.
    """
    require_peft(f"{folder} holds an adapter alone, which")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(backbone, str(folder), torch_device="cpu")
            backbone = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT's own code for a kind of adapter, which may raise anything
        raise DataError(f"{folder}: this adapter does not go into its base: {first_line(error)[:300]}") from error
    logger.info("%s: an adapter, merged into its base", folder)
    return backbone.requires_grad_(True).to(dtype)  # type: ignore[arg-type,no-any-return]
