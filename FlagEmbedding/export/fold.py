"""``export fold``: a checkpoint with experts as a plain encoder, which every server takes, and what that costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from FlagEmbedding.evaluation.on_dev import check_collection
from FlagEmbedding.export.arguments import FoldOptions
from FlagEmbedding.export.measure import Kind, measure, weight_size
from FlagEmbedding.export.samples import Samples, find_samples
from FlagEmbedding.inference.text_encoder import Kind as Output
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.folding import fold_experts
from FlagEmbedding.modeling.heads import load_heads
from FlagEmbedding.modeling.moe import record_routing
from FlagEmbedding.modeling.projections import load_projections
from FlagEmbedding.modeling.stored import StoredTensors
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.folders import check_new_folder, new_folder, write_record
from FlagEmbedding.utils.identity import model_fingerprint
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
RECORD = "export.json"


def fold(options: FoldOptions, before: Kind | None = None) -> list[Kind]:
    """Write the folded checkpoint; both forms, measured (the one with experts unless it was ``before``).

    Raises:
        UserError: no experts, no such expert, a folder in the way, texts that cannot be read.
    """
    source, dev = options.source, options.dev
    check_new_folder(source.output_dir, RECORD, source.overwrite)
    if dev.eval_data_dir:
        check_collection(dev)
    samples = find_samples(options.sample, dev)
    original = TextEncoder(source.encoder(heads=True))
    folder = Path(original.folder)
    shares = shares_of(original, options, samples)
    name = f"folded ({options.fold.method})"
    with new_folder(source.output_dir, RECORD, source.overwrite) as draft:
        save_checkpoint(_folded(original, shares), draft, tokenizer=original.tokenizer)
        reference = samples.vectors(original, dev)
        kinds = [before or measure("with experts", original, weight_size(folder), samples, reference, dev)]
        folded = TextEncoder(source.encoder(str(draft)))
        kinds.append(measure(name, folded, weight_size(draft), samples, reference, dev))
        value = {
            "kind": "fold", "model": source.model, "sha256": model_fingerprint(folder), "method": options.fold.method,
            "shares": shares, "texts": len(reference), "kinds": {kind.name: kind.record() for kind in kinds},
            "arguments": {**asdict(options.sample), **asdict(dev)}, "provenance": provenance(),
        }  # fmt: skip
        write_record(draft, RECORD, value)
    return kinds


def shares_of(encoder: TextEncoder, options: FoldOptions, samples: Samples) -> list[list[float]]:
    """For each MoE layer the share of each expert, by ``--method``.

    Raises:
        UsageError: the model has no experts, or fewer than ``expert:K`` asks for.
    """
    layers, method = moe_layers(encoder.encoder), options.fold
    if not layers:
        raise UsageError(f"{encoder.name} has no experts: there is nothing to fold")
    count = len(layers[0].experts)
    if method.expert is not None and method.expert >= count:
        raise UsageError(f"--method expert:{method.expert}: {encoder.name} has {count} experts, 0 to {count - 1}")
    if method.expert is not None:
        return [[float(number == method.expert) for number in range(count)] for _ in layers]
    if method.method == "average":
        return [[1 / count] * count for _ in layers]
    return router_load(encoder, options, samples)


def router_load(encoder: TextEncoder, options: FoldOptions, samples: Samples) -> list[list[float]]:
    """How much of what the vectors read comes from each expert, layer by layer, over the sample texts.

    A token counts with the weights that its router gives (with one expert per token: 1). The last layer of a cls model
    counts first tokens alone where there are no heads: nothing else of it is read.
    """
    want: tuple[Output, ...] = ("dense", "sparse", "colbert") if encoder.has_heads else ("dense",)
    layers = moe_layers(encoder.encoder)
    totals = [torch.zeros(len(layer.experts), dtype=torch.float64) for layer in layers]
    with record_routing(encoder.encoder) as tape:
        for texts, length in samples.prefixed(encoder, options.dev):
            for start in range(0, len(texts), 64):  # the tape holds a piece at a time
                for _ in encoder.encode([(texts[start : start + 64], None)], length, want):
                    pass
                for total, calls in zip(totals, tape.layers, strict=True):
                    for routing in calls:
                        _count(total, routing.experts, routing.weights)
                tape.clear()
    return [(total / total.sum()).tolist() for total in totals]


def _count(total: Tensor, experts: Tensor, weights: Tensor) -> None:
    total.index_add_(0, experts.reshape(-1).cpu(), weights.reshape(-1).double().cpu())


def _folded(original: TextEncoder, shares: list[list[float]]) -> M3Encoder:
    """The dense model with everything else as it was, in the dtype in which the checkpoint is stored."""
    folder = Path(original.folder)
    backbone = load_backbone(folder, dtype=StoredTensors(folder).dtype)
    fold_experts(backbone, shares)
    hidden = int(backbone.config.hidden_size)
    colbert, sparse, found = load_heads(folder, hidden)
    return M3Encoder(
        backbone,
        colbert_linear=colbert if found else None,
        sparse_linear=sparse if found else None,
        pooling=original.pooling,
        normalize=original.stored.normalize is not False,
        projections=load_projections(original.stored.dense, hidden),
        instructions=original.stored.instructions,
    )
