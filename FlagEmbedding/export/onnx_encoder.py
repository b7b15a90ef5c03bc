"""A graph in onnxruntime in the place of the model: whatever takes a :class:`TextEncoder` (steps 0 to 2) takes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.families import pad_id
from FlagEmbedding.modeling.options import SLAB_TOKENS
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError


class OnnxEncoder(TextEncoder):
    """The graph in ``file`` with everything around it (tokenizer, instructions, windows) that ``source`` has.

    Args:
        source: the checkpoint that the graph was made from.
        file: the graph.
        threads: of onnxruntime.
    """

    def __init__(self, source: TextEncoder, file: Path, threads: int = 1) -> None:
        # Loaded parts are shared with the source: a second model of 2 GB would be read for its tokenizer.
        self.__dict__.update(source.__dict__)
        self.session = open_session(file, threads)
        self.graph = file.name

    def describe(self) -> dict[str, Any]:
        """What decides the vectors, for a manifest."""
        return {**super().describe(), "engine": f"onnxruntime {self.graph}"}

    def represent(self, tokens: TokenBatch, want: Collection[Kind], slab_tokens: int = SLAB_TOKENS) -> Representations:
        """As the source's, computed by the graph."""
        names: list[Kind] = [kind for kind in ("dense", "sparse", "colbert") if kind in want]
        rows: dict[Kind, list[np.ndarray]] = {name: [np.empty(0)] * len(tokens) for name in names}
        for places in _batches(tokens.lengths, slab_tokens):
            piece = tokens.select(places)
            ids, mask = piece.pad(pad_id(self.encoder.model), max(piece.lengths))
            found = self.session.run(names, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            for name, values in zip(names, found, strict=True):
                for row, (place, length) in enumerate(zip(places, piece.lengths, strict=True)):
                    own = {"dense": values[row], "sparse": values[row][:length]}
                    rows[name][place] = own[name] if name in own else values[row][: length - 1]
        result = Representations(tokens)
        if "dense" in rows:
            result.dense = torch.from_numpy(np.stack(rows["dense"])) if len(tokens) else None
        if "sparse" in rows:
            result.token_weights = torch.from_numpy(np.concatenate(rows["sparse"]))
        if "colbert" in rows:
            result.colbert = torch.from_numpy(np.concatenate(rows["colbert"]))
        return result


def open_session(file: Path, threads: int) -> Any:
    """The graph in onnxruntime, on the CPU. Raises ``UsageError`` where onnxruntime cannot run it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own kinds of error
        raise UsageError(f"{file}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error


def _batches(lengths: list[int], slab_tokens: int) -> Iterator[list[int]]:
    """Places of sequences, by length, of at most ``slab_tokens`` tokens with padding."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > slab_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
