"""Checkpoints: load an encoder (dense or with experts), turn dense layers into experts, choose what trains, save.

A checkpoint describes itself: ``config.json`` says whether and where there are experts, and loading needs its path and
no flag. Nothing is initialized at random in silence: a weight that is missing or left over is an error. Loading never
runs code out of a checkpoint; the classes are transformers' own and ours.

The only module that knows the key names of a state dict.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from FlagEmbedding.modeling import adapters, interchange
from FlagEmbedding.modeling.files import first_line, load_config, weight_files, weight_keys
from FlagEmbedding.modeling.heads import HEAD_FILES, read_state, save_heads
from FlagEmbedding.modeling.into_place import move_into_place
from FlagEmbedding.modeling.moe import MoEConfig, MoELinear, trainable_class
from FlagEmbedding.modeling.pooling import check_method
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.reading import POOLER_KEY, read_model
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import CLASS_PREFIX, expert_places
from FlagEmbedding.utils.adapter_folder import base_of, is_adapter
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.io import PathLike, follow_umask, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

MOE_FIELDS = ("moe", "num_experts", "num_experts_per_tok", "only_train")
ROUTER_FIELD = "router"  # in config.json where the router is not the published one
_EXPERT_KEY = re.compile(r"encoder\.layer\.\d+\.(intermediate|output)\.dense\.experts\.(\d+)\.")


# ---- loading ----


def stored_experts(config: PreTrainedConfig, source: PathLike) -> MoEConfig | None:
    """The experts that a configuration describes; None for a dense encoder. ``source`` is named in errors."""
    if getattr(config, "moe", None) is None:
        return None
    missing = [name for name in ("num_experts", "num_experts_per_tok") if getattr(config, name, None) is None]
    if missing:
        raise DataError(f"{source}/config.json says moe {config.moe!r} but lacks {' and '.join(missing)}")
    try:
        return MoEConfig(
            moe=config.moe, num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
            router=getattr(config, ROUTER_FIELD, "learned"),
        )  # fmt: skip
    except UsageError as error:
        raise DataError(f"{source}/config.json: {str(error).removeprefix('--')}") from error


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
        name_or_path: checkpoint folder or hub id; of an adapter alone, its base with it merged.
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
    if not is_adapter(folder):
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
    if stored is not None and stored.router != "learned":
        setattr(config, ROUTER_FIELD, stored.router)
    if is_adapter(folder):
        model = load_backbone(base_of(folder, cache_dir), config=config, cache_dir=cache_dir)
        model = adapters.merge_adapter(model, folder, dtype)
    else:
        model = read_model(folder, config, stored is not None, dtype)
    if stored is None and asked.moe is not None:
        insert_experts(model, asked)
    if moe is not None:
        model.config.only_train = moe.only_train
    for layer in moe_layers(model):
        layer.router_gradient, layer.router_jitter = asked.router_gradient, asked.router_jitter
    return model


def _refuse_contradiction(asked: MoEConfig, stored: MoEConfig, folder: Path) -> None:
    if asked.moe is None:
        return
    counts = (asked.num_experts, asked.num_experts_per_tok)
    same = counts in ((1, 1), (stored.num_experts, stored.num_experts_per_tok))
    if asked.moe == stored.moe and same and asked.router in ("learned", stored.router):
        return
    raise UsageError(
        f"--moe {asked.moe} with {counts[0]} experts, {counts[1]} per token"
        f"{f' and --router {asked.router}' if asked.router != 'learned' else ''}, contradicts {folder}, which has "
        f"{stored.num_experts} experts in {stored.moe}, {stored.num_experts_per_tok} per token: leave --moe out, the "
        "checkpoint says it itself"
    )


def _check_expert_keys(stored: MoEConfig | None, keys: set[str], folder: Path) -> None:
    found = {match.groups() for key in keys if (match := _EXPERT_KEY.search(key))}
    places, count = {place for place, _ in found}, len({number for _, number in found})
    if stored is None and found:
        raise DataError(
            f"{folder} holds weights of {count} experts in {' and '.join(sorted(places))}, but its config.json does "
            "not say so: it needs moe, num_experts and num_experts_per_tok"
        )
    if stored is not None and (places != {stored.moe} or count != stored.num_experts):
        has = f"weights of {count} experts in {' and '.join(sorted(places))}" if found else "weights of dense layers"
        raise DataError(
            f"{folder}/config.json says {stored.num_experts} experts in {stored.moe}, but the folder holds {has}"
        )


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
        place.dense = MoELinear.from_linear(place.dense, config)
    for name in MOE_FIELDS:
        setattr(model.config, name, getattr(config, name))
    if config.router != "learned":
        setattr(model.config, ROUTER_FIELD, config.router)
    # The class that the same model has when it is loaded: it knows how to save itself so that nobody misreads it.
    dense_class: Any = type(model)
    model.__class__ = trainable_class(dense_class)


def moe_layers(model: nn.Module) -> list[MoELinear]:
    """The MoE layers of a model, in the order of the encoder; none for a dense one."""
    return [module for module in model.modules() if isinstance(module, MoELinear)]


# ---- training ----


def select_trainable(
    model: nn.Module, only_train: str | None, fix_encoder: bool = False, fix_position_embedding: bool = False
) -> None:
    """Set ``requires_grad`` of every parameter of an ``M3Encoder`` (or a bare backbone).

    Args:
        only_train: ``intermediate`` or ``output``: of the backbone only ``encoder.layer.*.{this}.dense.*`` trains,
            experts and gate included. The heads of unified fine-tuning train as well: frozen they would stay random,
            and nobody asks for that.
        fix_encoder: the backbone is frozen, the heads alone train.
        fix_position_embedding: the position embeddings are frozen.

    Raises:
        UsageError: nothing would train.
    """
    kept = re.compile(rf"(^|\.)encoder\.layer\.\d+\.{only_train}\.dense\.") if only_train else None
    for name, parameter in model.named_parameters():
        if re.match(r"(colbert|sparse)_linear\.", name):
            parameter.requires_grad_(True)
        elif fix_encoder or POOLER_KEY.search(name) or (kept is not None and not kept.search(name)):
            parameter.requires_grad_(False)
        else:
            parameter.requires_grad_(not (fix_position_embedding and "position_embeddings" in name))
    for layer in moe_layers(model):
        if layer.router != "learned":
            layer.gate.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "nothing would train: --fix_encoder needs --unified_finetuning True, --only_train needs an encoder with "
            "encoder.layer.*.{intermediate,output}.dense"
        )


def load_trained_state(model: nn.Module, folder: PathLike) -> None:
    """Put a checkpoint's tensors into ``model`` (an ``M3Encoder``), for continuing a run exactly.

    Raises:
        DataError: the checkpoint does not hold exactly this model's tensors.
    """
    source, adapted = Path(folder), adapters.has_adapters(model)
    state: dict[str, Tensor] = {}
    if is_adapter(source) and not adapted:
        state = load_backbone(source).state_dict()
    for file in [] if adapted or state else weight_files(source):
        state |= load_file(file)
    try:
        if adapted:
            adapters.load_adapter_state(model.model, source)  # type: ignore[arg-type]
        own = model.model.state_dict()  # type: ignore[union-attr]
        stored = {own[key].data_ptr(): value for key, value in state.items() if key in own}
        tied = {key: stored[value.data_ptr()] for key, value in own.items() if value.data_ptr() in stored}
        model.model.load_state_dict(tied | state, strict=not adapted)  # type: ignore[union-attr]
        for number, projection in enumerate(getattr(model, "projections", ()), 2):
            projection.load_state_dict(load_file(source / f"{number}_Dense" / "model.safetensors"))
        for name, head_file in HEAD_FILES.items():
            head = getattr(model, f"{name}_linear", None)
            if head is not None:
                head.load_state_dict(read_state(source / head_file))
    except RuntimeError as error:
        raise DataError(f"{folder} holds another model than the one being trained: {first_line(error)}") from error


# ---- saving ----


def save_checkpoint(
    model: nn.Module,
    output_dir: PathLike,
    tokenizer: Any = None,
    heads: dict[str, nn.Linear] | None = None,
    pooling: str = "cls",
    normalize: bool = True,
    max_length: int | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint that every library can load by its path.

    config.json (base fields, and with experts the published four), model.safetensors (bare keys), tokenizer, heads,
    sentence-transformers' files, and with experts the modelling file. Everything is first written to a folder inside
    ``output_dir`` and then moved into place, weights before config.json; files of an older checkpoint there that would
    contradict it are removed, other files stay.

    Args:
        model: an ``M3Encoder``, which brings its heads, pooling and normalization, or a bare backbone.
        heads: for a bare backbone: ``colbert`` and ``sparse`` heads; its vectors have no ``Dense`` modules and no
            instructions.
        max_length: for sentence-transformers; None: the tokenizer's limit, at most what the positions allow.
        state_dict: ``model``'s state gathered from elsewhere (FSDP, DeepSpeed); None: its own.
    """
    backbone = model if isinstance(model, PreTrainedModel) else model.model
    assert isinstance(backbone, PreTrainedModel)
    if backbone is not model:
        pooling, normalize = str(model.pooling), bool(model.normalize)
        heads = {name: head for name in HEAD_FILES if (head := getattr(model, f"{name}_linear")) is not None}
    projections: Any = list(getattr(model, "projections", ()))
    adapter: adapters.AdapterSource | None = getattr(model, "adapter", None)
    alone = adapter is not None and adapter.alone
    parts = _split_state(model, backbone, heads or {}, state_dict)
    target = Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        draft = Path(temporary)
        if adapter is not None:
            adapters.write_adapter(backbone, draft if adapter.alone else draft / adapters.FOLDER, adapter.base)
        if not alone:
            _save_tensors(parts.weights, draft / "model.safetensors")
        save_heads(draft, parts.heads)
        for number, state in enumerate(parts.projections, 2):
            (draft / f"{number}_Dense").mkdir()
            _save_tensors(state, draft / f"{number}_Dense" / "model.safetensors")
        if tokenizer is not None:
            _save_tokenizer(tokenizer, draft)
        described = interchange.sentence_transformers_files(
            backbone.config.hidden_size,
            check_method(pooling),
            normalize,
            max_length or _max_length(backbone, tokenizer),
            tuple(projection.said for projection in projections),
            getattr(model, "instructions", interchange.NO_INSTRUCTIONS),
        )
        for path, content in described.items():
            write_json_atomic(draft / path, content)
        if moe_layers(backbone) and not alone:
            shutil.copyfile(interchange.REMOTE_FILE, draft / interchange.REMOTE_FILE.name)
        if not alone:
            write_json_atomic(draft / "config.json", _config_fields(backbone))
        move_into_place(draft, target)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    follow_umask(path)


class _Parts(NamedTuple):
    weights: dict[str, Tensor]  # of the backbone, with bare keys
    heads: dict[str, dict[str, Tensor]]
    projections: list[dict[str, Tensor]]


def _split_state(
    model: nn.Module, backbone: PreTrainedModel, heads: dict[str, nn.Linear], state: dict[str, Tensor] | None
) -> _Parts:
    """What belongs to which file, from ``model``'s state (gathered elsewhere, or its own)."""
    projections: Any = list(getattr(model, "projections", ()))
    if state is None or backbone is model:
        head_states = {name: head.state_dict() for name, head in heads.items()}
        dense = [_portable(projection.state_dict()) for projection in projections]
        return _Parts(_portable(adapters.merged_state(backbone) if state is None else state), head_states, dense)
    everything = state

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}

    return _Parts(
        _portable(below("model.")),
        {name: below(f"{name}_linear.") for name in heads},
        [_portable(below(f"projections.{number}.")) for number in range(len(projections))],
    )


def _portable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and whole; a weight that stands under two names (T5's embeddings) once, under its first."""
    names = {value.data_ptr(): key for key, value in reversed(state.items())}
    return {
        key: value.detach().cpu().contiguous()
        for key, value in state.items()
        if not value.numel() or names[value.data_ptr()] == key
    }


def _config_fields(backbone: PreTrainedModel) -> dict[str, Any]:
    """``config.json``: what transformers would write, without the traces of where it was loaded from."""
    fields: dict[str, Any] = json.loads(backbone.config.to_json_string())
    for name in ("_name_or_path", "auto_map", "transformers_weights"):  # set again below where they belong
        fields.pop(name, None)
    base_class = type(backbone).__name__
    layers = moe_layers(backbone)
    if layers:
        base_class = base_class.removeprefix(CLASS_PREFIX)
        fields |= interchange.remote_code_fields(base_class)
        fields |= {name: getattr(backbone.config, name, None) for name in MOE_FIELDS}
    fields["architectures"] = [base_class]
    fields["dtype"] = str(next(backbone.parameters()).dtype).removeprefix("torch.")
    return fields


def _save_tokenizer(tokenizer: Any, draft: Path) -> None:
    tokenizer.save_pretrained(draft)
    # transformers 5 writes tokenizer.json alone; older readers look for the sentencepiece model it was made from.
    source = getattr(tokenizer, "vocab_file", None)
    if source and Path(source).is_file() and not (draft / Path(source).name).exists():
        shutil.copyfile(source, draft / Path(source).name)


def _max_length(backbone: PreTrainedModel, tokenizer: Any) -> int | None:
    """The longest sequence that the position table and the tokenizer allow; None where neither says."""
    limits = (longest_input(backbone), getattr(tokenizer, "model_max_length", None))
    return min((int(limit) for limit in limits if limit is not None and limit < 10**9), default=None)
