"""What decides a run: written into every checkpoint, and compared before a run goes on from one.

Every option has one kind. ``meaning``: compared by what it stands for here (bytes of the files, steps of the run),
since two spellings can say the same. ``harmless``: no number depends on it beyond rounding. ``fixed``: the optimizer's
state or the weights of a checkpoint fit no other value. ``call``: it speaks of this start alone. Whatever is named
nowhere, such as an option that a later transformers brings, is ``decisive``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from FlagEmbedding.finetune.arguments import Arguments, RetrieverTrainingArguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import as_json, digest, file_digest, model_fingerprint
from FlagEmbedding.utils.processes import on_main

Kind = Literal["call", "meaning", "harmless", "decisive", "fixed"]

_CALL = {
    "resume_from_checkpoint", "resume_anyway", "overwrite_output_dir", "local_rank", "hub_token",
    "enable_jit_checkpoint", "plan",
}  # fmt: skip
_MEANING = {
    "train_data", "refresh_corpus", "model_name_or_path", "config_name", "tokenizer_name", "num_train_epochs",
    "max_steps", "warmup_steps", "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps",
    "data_seed",
}  # fmt: skip
_FIXED = {
    "moe", "only_train", "num_experts", "fix_encoder", "fix_position_embedding", "unified_finetuning", "colbert_dim",
    "optim", "optim_target_modules", "fsdp", "deepspeed", "parallelism_config",
    "lora_r", "lora_target", "use_dora",
}  # fmt: skip
_HARMLESS = {
    # where things lie and what is reported
    "cache_dir", "cache_path", "output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug",
    "skip_memory_metrics", "push_to_hub", "load_best_model_at_end", "greater_is_better",
    "include_num_input_tokens_seen", "include_for_metrics", "prediction_loss_only", "batch_eval_metrics",
    "label_names", "length_column_name", "do_train", "do_eval", "do_predict", "per_device_eval_batch_size",
    "bf16_full_eval", "fp16_full_eval", "early_stopping_patience", "report", "model_card", "license",
    "lora_save",
    # how the same numbers are computed: beyond rounding no result depends on these
    "engine", "slab_tokens", "grad_cache", "enable_sub_batch", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_cpu", "use_cache",
    "full_determinism",
}  # fmt: skip
_HARMLESS_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "ddp_", "dataloader_")
# Of those prefixes: which rows and batches there are, and in what order they come.
_DECISIVE = {
    "dataloader_drop_last", "dataloader_in_order", "eval_rows",
    # What is best of the evaluations before and after would be told by different figures.
    "eval_languages", "eval_split", "eval_corpus", "eval_pool_mined", "eval_pool_random", "eval_metrics",
    "eval_query_length", "eval_passage_length", "eval_with_title",
}  # fmt: skip
# Schedules whose rate at a step does not depend on how many steps follow.
_OPEN_ENDED = {"constant", "constant_with_warmup", "inverse_sqrt"}


def kind_of(option: str) -> Kind:
    """What a difference in ``option`` means for a run that goes on."""
    for kind, names in (("call", _CALL), ("meaning", _MEANING), ("fixed", _FIXED), ("harmless", _HARMLESS)):
        if option in names:
            return kind  # type: ignore[return-value]
    return "harmless" if option.startswith(_HARMLESS_PREFIXES) and option not in _DECISIVE else "decisive"


@dataclass(frozen=True)
class Fingerprint:
    """What decides a run.

    Attributes:
        options: every option that is compared, by its flag.
        facts: what the others come to: (value, kind) by a name that says which flags it comes from.
        config: the model's configuration.
        files: name, SHA-256 and number of rows of each training file, in order.
        batches: SHA-256 over which rows make which batches.
    """

    options: dict[str, Any]
    facts: dict[str, tuple[Any, Kind]]
    config: dict[str, Any]
    files: list[dict[str, Any]]
    batches: str

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        record: dict[str, Any] = as_json(asdict(self))
        return record


@dataclass
class Differences:
    """What differs between the run of a checkpoint and this one, in words, by what it means."""

    harmless: list[str] = field(default_factory=list)
    decisive: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    @property
    def refused(self) -> list[str]:
        """All that make this another run."""
        return self.decisive + self.fixed

    def add(self, kind: str, name: str, there: Any, here: Any) -> None:
        """Note that ``name`` differs."""
        text = f"{name}: the checkpoint has {_shown(there)}, this run says {_shown(here)}"
        {"harmless": self.harmless, "fixed": self.fixed}.get(kind, self.decisive).append(text)


def fingerprint(
    arguments: Arguments, dataset: TrainDataset, sampler: TaskBatchSampler, model: BiEncoder
) -> Fingerprint:
    """Of a run that is built but has not begun. ``arguments`` as the model's folder completes them."""
    groups = {name: asdict(group) for name, group in vars(arguments).items() if name != "training"}
    every = {flag: value for group in groups.values() for flag, value in group.items()}
    every |= arguments.training.to_dict()  # type: ignore[no-untyped-call]
    if isinstance(every.get("accelerator_config"), dict):
        every["accelerator_config"].pop("non_blocking", None)  # set by us where there is a device
    options = {flag: value for flag, value in every.items() if kind_of(flag) not in ("call", "meaning")}
    config = {key: value for key, value in model.model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str()) if model.tokenizer.is_fast else {}
    spoken = {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}
    facts = {
        **_schedule(arguments.training, len(sampler)),
        **_batches(arguments, model),
        "tokenizer (--tokenizer_name)": (digest(spoken or model.tokenizer.get_vocab())[:16], "decisive"),
        "--data_seed": (arguments.training.sampling_seed, "decisive"),
    }
    if arguments.lora.lora_r:  # whose checkpoints do not bring the base's weights
        folder = resolve_folder(arguments.model.model_name_or_path, cache_dir=arguments.model.cache_dir)
        facts["weights of --model_name_or_path"] = (on_main(lambda: model_fingerprint(folder))[:16], "fixed")
    if corpus := arguments.refresh.refresh_corpus:
        facts["--refresh_corpus"] = (_corpus(corpus), "decisive")
    return Fingerprint(
        options=json.loads(json.dumps(options, default=str)),
        facts=facts,
        config=json.loads(json.dumps(config, default=str)),
        files=[
            {"name": Path(stored.file.path).name, "sha256": stored.digest, "rows": stored.statistics.rows}
            for stored in dataset.files
        ],
        batches=sampler.plan_digest(arguments.objective.negatives_cross_device),
    )


_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}


def _schedule(training: RetrieverTrainingArguments, batches: int) -> dict[str, tuple[Any, Kind]]:
    """Length of the run and of its warmup, in optimizer steps, as the Trainer counts them."""
    micro = batches // training.world_size
    per_epoch = max(1, math.ceil(micro / training.gradient_accumulation_steps))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    kind: Kind = "harmless" if name in _OPEN_ENDED else "decisive"
    return {
        f"steps of the run (--max_steps, --num_train_epochs; the {name} schedule ends there)": (total, kind),
        "warmup steps (--warmup_steps, --warmup_ratio)": (training.get_warmup_steps(total), "decisive"),
    }


def _batches(arguments: Arguments, model: BiEncoder) -> dict[str, tuple[Any, Kind]]:
    """How many queries there are to a step, to a loss, and to whatever else is counted by the forward."""
    training, objective = arguments.training, arguments.objective
    own, world, turns = training.per_device_train_batch_size, training.world_size, training.gradient_accumulation_steps
    pool = own * world if objective.negatives_cross_device else own
    facts: dict[str, tuple[Any, Kind]] = {
        "queries per step (--global_batch_size, or batch size × accumulation × processes)": (
            own * world * turns,
            "decisive",
        ),
        "queries that share their negatives (--per_device_train_batch_size)": (pool, "decisive"),
        "processes": (world, "fixed" if training.deepspeed else "harmless"),
    }
    config = model.model.config.to_dict()
    drops = [value for key, value in config.items() if "dropout" in key and isinstance(value, float)]
    if (
        any(drops) or arguments.experts.router_jitter or arguments.lora.lora_dropout
    ) and not training.deals_out_batches(objective.negatives_cross_device):
        facts["random streams of dropout, one for each process: not bit for bit the uninterrupted run"] = (
            world,
            "harmless",
        )
    if objective.has_router_loss and model.has_experts:
        facts["queries that share a router loss (--per_device_train_batch_size)"] = (own, "decisive")
    if objective.use_self_distill and objective.self_distill_start_step >= 0:
        facts["forwards per step, which --self_distill_start_step counts"] = (turns, "decisive")
    return facts


def _corpus(named: Sequence[str]) -> str:
    """SHA-256 over all files of ``--refresh_corpus``."""
    whole = hashlib.sha256()
    for path in map(Path, named):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            whole.update(file_digest(file).encode())
    return whole.hexdigest()[:16]


def compare(there: dict[str, Any], here: Fingerprint) -> Differences:
    """Name what differs between the record of a checkpoint and this run."""
    now, found = here.record(), Differences()
    for flag in sorted({*there["options"], *now["options"]}):
        # An option that one of two library versions does not know says nothing.
        if flag in there["options"] and flag in now["options"]:
            before, after = there["options"][flag], now["options"][flag]
            if before != after:
                found.add(kind_of(flag), f"--{flag}", before, after)
    for name in dict.fromkeys([*now["facts"], *there["facts"]]):
        before, after = (side["facts"].get(name, (None, "decisive")) for side in (there, now))
        if before[0] != after[0]:
            found.add(str(after[1]), name, before[0], after[0])
    for key in sorted(there["config"].keys() & now["config"].keys()):
        if there["config"][key] != now["config"][key]:
            found.add("decisive", f"the model's {key}", there["config"][key], now["config"][key])
    data = list(_data_differences(there["files"], now["files"]))
    found.decisive += data
    if there["batches"] != now["batches"] and not found.refused:
        found.decisive.append(
            "the order of the batches differs (the number of processes or the folders of the files are others; "
            "--global_batch_size, given from the start of a run, makes it independent of the processes)"
        )
    return found


def _data_differences(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    before, after = ([file["sha256"] for file in side] for side in (there, here))
    if before == after:
        return []
    name = "--train_data"
    if sorted(before) == sorted(after):
        order = ("the checkpoint has", there), ("this run says", here)
        return [f"{name}: another order of the files: " + ", ".join(f"{says} {_names(side)}" for says, side in order)]
    if len(before) == len(after) and [f["name"] for f in there] == [f["name"] for f in here]:
        return [
            f"{name}: {old['name']} has another content (the checkpoint has {old['rows']} rows, this run says "
            f"{new['rows']})"
            for old, new in zip(there, here, strict=True)
            if old["sha256"] != new["sha256"]
        ]
    sizes = [f"{len(side)} file(s) of {sum(f['rows'] for f in side)} rows ({_names(side)})" for side in (there, here)]
    return [f"{name}: the checkpoint has {sizes[0]}, this run says {sizes[1]}"]


def _names(files: list[dict[str, Any]]) -> str:
    names = [file["name"] for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
