"""The encoder as one ONNX graph: padded ids and mask in, dense, sparse, colbert and the hidden states out.

Experts: which tokens an expert gets depends on the data, and a graph's shapes must not. In the graph every expert runs
on all tokens, and the router's weights select (0 for those that were not chosen): the same values, E times the work of
these layers.

Shape legend: N rows, L tokens, D hidden size, Dc width of colbert vectors, E experts, K chosen per token.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.families import own_forward
from FlagEmbedding.modeling.moe import MoELinear
from FlagEmbedding.modeling.pooling import pool_padded
from FlagEmbedding.modeling.remote_code.modeling_moe_encoder import expert_places, hashed_experts
from FlagEmbedding.utils.errors import DataError, UsageError

OPSET = 17
STATES = "last_hidden_state"  # what sentence-transformers' ONNX backend pools itself
# A protobuf holds two gibibytes; beyond this the weights go to a second file.
LARGEST_FILE = 1_800_000_000
_AXES: dict[str, dict[int, str]] = {
    "input_ids": {0: "rows", 1: "tokens"},
    "attention_mask": {0: "rows", 1: "tokens"},
    "dense": {0: "rows"},
    "sparse": {0: "rows", 1: "tokens"},
    "colbert": {0: "rows", 1: "later_tokens"},
    STATES: {0: "rows", 1: "tokens"},
}


class AllExperts(nn.Module):
    """``sum_e w_e expert_e(x)`` with the router's weights ``w``, most of them 0; shapes do not depend on the data."""

    def __init__(self, layer: MoELinear) -> None:
        super().__init__()
        self.gate, self.experts, self.per_token = layer.gate, layer.experts, layer.num_experts_per_tok
        self.by_hash = layer.router == "hash"

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., I]``."""
        if self.by_hash:
            experts = hashed_experts(len(self.experts)).unsqueeze(-1)  # [..., 1]
            weights = torch.ones(1, dtype=x.dtype)
        else:
            chosen, experts = torch.topk(self.gate(x), self.per_token, dim=-1)  # [..., K]
            weights = torch.softmax(chosen, dim=-1)
        y = torch.zeros(1, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            share = (weights * (experts == number).to(x.dtype)).sum(dim=-1, keepdim=True)  # [..., 1]
            y = y + share * expert(x)
        return y


class Graph(nn.Module):
    """What is exported: an ``M3Encoder`` in its padded form, with everything normalized."""

    def __init__(self, encoder: M3Encoder, heads: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, tuple(heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Ids and mask ``[N, L]``, right-padded, to the ``heads`` in their order, then the states ``[N, L, D]``."""
        encoder = self.encoder
        states = own_forward(encoder.model, input_ids, attention_mask)
        real = attention_mask.to(states.dtype)
        found: list[Tensor] = []
        for head in self.heads:
            if head == "dense":
                dense = pool_padded(states, attention_mask, encoder.pooling)
                for projection in encoder.projections:
                    dense = projection(dense)
                found.append(F.normalize(dense, dim=-1))
            elif head == "sparse":
                assert encoder.sparse_linear is not None
                found.append(torch.relu(encoder.sparse_linear(states)).squeeze(-1) * real)
            else:
                assert encoder.colbert_linear is not None
                vectors = F.normalize(encoder.colbert_linear(states[:, 1:]), dim=-1)
                found.append(vectors * real[:, 1:].unsqueeze(-1))
        return (*found, states)


def write_graph(encoder: M3Encoder, heads: Sequence[str], file: Path) -> None:
    """Write the graph of ``encoder`` (float32, on the CPU); with two gibibytes of weights also ``{file}_data``.

    Raises:
        UsageError: torch's exporter does not know an operation of this encoder.
    """
    import onnx

    graph = Graph(encoder, heads).eval()
    ids = torch.arange(5, 17).view(2, 6) % int(encoder.model.config.vocab_size)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    names = [*heads, STATES]
    scratch = file.parent / "scratch"
    scratch.mkdir(parents=True)
    with _exportable(encoder), torch.no_grad():
        try:
            torch.onnx.export(
                graph,
                (ids, mask),
                str(scratch / "model.onnx"),
                input_names=["input_ids", "attention_mask"],
                output_names=names,
                dynamic_axes={name: _AXES[name] for name in ("input_ids", "attention_mask", *names)},
                opset_version=OPSET,
                dynamo=False,  # the exporter by tracing: as right here, and ten times as fast
            )
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{type(encoder.model).__name__} cannot be exported: {reason}") from error
    save(onnx.load(str(scratch / "model.onnx")), file)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()


def save(model: Any, file: Path) -> None:
    """Write an ONNX model in one file, or where it is too large for one in two, and let onnx check it."""
    import onnx

    large = model.ByteSize() > LARGEST_FILE
    onnx.save_model(
        model, str(file), save_as_external_data=large, all_tensors_to_one_file=True, location=f"{file.name}_data"
    )
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise DataError(f"{file}: not a valid graph: {error}") from error


def quantize(source: Path, target: Path) -> None:
    """The graph with 8-bit weights (onnxruntime's dynamic quantization, one scale per channel).

    Weights keep to 7 of the 8 bits: processors without VNNI add pairs of products in 16 bits, which would overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(source), str(target), per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            use_external_data_format=graph_size(source) > 4 * LARGEST_FILE,
        )  # fmt: skip


def graph_size(file: Path) -> int:
    """Bytes of a graph and its weights."""
    data = file.with_name(f"{file.name}_data")
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)


@contextmanager
def _exportable(encoder: M3Encoder) -> Iterator[None]:
    """The encoder with shapes that do not depend on the data, and with attention as plain operations."""
    config: Any = encoder.model.config
    attention = config._attn_implementation
    places = expert_places(encoder.model, config.moe) if getattr(config, "moe", None) else []
    layers = [place.dense for place in places]
    encoder.model.set_attn_implementation("eager")
    try:
        for place, layer in zip(places, layers, strict=True):
            place.dense = AllExperts(layer).eval()
        with _quiet():
            yield
    finally:
        for place, layer in zip(places, layers, strict=True):
            place.dense = layer
        encoder.model.set_attn_implementation(attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to those who write exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
