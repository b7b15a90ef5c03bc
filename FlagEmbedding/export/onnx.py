"""``export onnx``: one graph with all of a checkpoint's outputs, compared with the checkpoint, beside its tokenizer.

onnx/model.onnx              ids and mask [rows, tokens], right-padded → dense [rows, D], sparse [rows, tokens],
                             colbert [rows, tokens - 1, Dc], last_hidden_state; one more file beside it from 2 GB on
onnx/model_int8.onnx         with --int8
config.json, tokenizer, modules.json …    what sentence-transformers (backend="onnx") and servers read
export.json                  what it was made from, what was measured, lengths and instructions to use it with
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FlagEmbedding.evaluation.on_dev import check_collection
from FlagEmbedding.export.arguments import HEADS, OnnxOptions
from FlagEmbedding.export.measure import Kind, measure, weight_size
from FlagEmbedding.export.onnx_encoder import OnnxEncoder
from FlagEmbedding.export.onnx_graph import graph_size, quantize, write_graph
from FlagEmbedding.export.parity import check_parity
from FlagEmbedding.export.samples import find_samples
from FlagEmbedding.inference.text_encoder import Kind as Output
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.modeling.backbone import save_checkpoint
from FlagEmbedding.modeling.heads import HEAD_FILES
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.folders import check_new_folder, new_folder, write_record
from FlagEmbedding.utils.identity import model_fingerprint
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
RECORD = "export.json"


def export(options: OnnxOptions, before: Kind | None = None) -> list[Kind]:
    """Write the folder; the checkpoint (unless it was measured ``before``) and every graph, measured.

    Raises:
        UserError: a head that the checkpoint lacks, an encoder that cannot be exported, a graph that gives other
            values than the checkpoint, a folder in the way.
    """
    _check_installed()
    source, dev = options.source, options.dev
    check_new_folder(source.output_dir, RECORD, source.overwrite)
    if dev.eval_data_dir:
        check_collection(dev)
    samples = find_samples(options.sample, dev)
    encoder = TextEncoder(source.encoder(heads=True))
    heads = chosen_heads(encoder, options.onnx.heads)
    with new_folder(source.output_dir, RECORD, source.overwrite) as draft:
        file = draft / "onnx" / "model.onnx"
        write_graph(encoder.encoder, heads, file)
        graph = OnnxEncoder(encoder, file)
        difference = check_parity(encoder, graph, samples, dev, heads)
        logger.info("%s: the graph agrees with the checkpoint to %.1e", source.model, difference)
        graphs = {"onnx": file}
        if options.onnx.int8:
            graphs["onnx int8"] = file.with_name("model_int8.onnx")
            quantize(file, graphs["onnx int8"])
        reference = samples.vectors(encoder, dev)
        size = weight_size(Path(encoder.folder))
        kinds = [before or measure("checkpoint", encoder, size, samples, reference, dev)]
        for name, path in graphs.items():
            form = graph if path == file else OnnxEncoder(encoder, path)
            kinds.append(measure(name, form, graph_size(path), samples, reference, dev))
        _write_surroundings(encoder, draft)
        value = {
            "kind": "onnx", "model": source.model, "sha256": model_fingerprint(encoder.folder),
            "heads": list(heads), "difference": difference, **_usage(encoder),
            "kinds": {kind.name: kind.record() for kind in kinds},
            "arguments": {**asdict(options.sample), **asdict(dev)}, "provenance": provenance(),
        }  # fmt: skip
        write_record(draft, RECORD, value)
    return kinds


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: pip install 'FlagEmbedding[export]'")


def chosen_heads(encoder: TextEncoder, asked: list[str]) -> list[Output]:
    """The outputs of the graph, dense always among them. Raises ``UsageError`` for one that the checkpoint lacks."""
    there = HEADS if encoder.has_heads else HEADS[:1]
    if lacking := [head for head in asked if head not in there]:
        raise UsageError(f"--heads {lacking[0]}: {encoder.name} has no sparse and colbert heads, only dense vectors")
    return [head for head in there if head == "dense" or not asked or head in asked]  # type: ignore[misc]


def _usage(encoder: TextEncoder) -> dict[str, Any]:
    """What whoever feeds the graph must know."""
    return {
        "pooling": encoder.pooling,
        "normalized": True,
        "max_length": encoder.longest,
        "query_instruction": encoder.stored.instructions.query,
        "passage_instruction": encoder.stored.instructions.passage,
    }


def _write_surroundings(encoder: TextEncoder, draft: Path) -> None:
    """Configuration, tokenizer and sentence-transformers' files as a checkpoint has them, without its weights."""
    folder = draft / "checkpoint"
    model = encoder.encoder
    model.normalize, model.instructions = True, encoder.stored.instructions
    try:
        save_checkpoint(model, folder, tokenizer=encoder.tokenizer)
    finally:
        model.normalize = False
    for weights in ("model.safetensors", *HEAD_FILES.values()):
        (folder / weights).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        shutil.move(path, draft / path.name)
    folder.rmdir()
