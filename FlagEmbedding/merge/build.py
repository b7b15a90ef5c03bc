"""The merged encoder: the tuned checkpoint's, its tensors replaced one by one by averages read from all folders.

Memory holds one model and one tensor, whatever the number of checkpoints.

A dense checkpoint among some with experts counts as upcycled: each expert gets its dense layer. What only some have
(a gate, the heads of unified training) is averaged among those alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from FlagEmbedding.merge.arguments import Method
from FlagEmbedding.merge.sources import Source, agreed
from FlagEmbedding.merge.weights import combine
from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.heads import HEAD_FILES, load_heads, read_state
from FlagEmbedding.modeling.interchange import NO_INSTRUCTIONS
from FlagEmbedding.modeling.projections import Projection, load_projections
from FlagEmbedding.modeling.stored import StoredTensors
from FlagEmbedding.modeling.tokenizer import load_tokenizer
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
_EXPERT = re.compile(r"(\.dense)\.experts\.\d+(\.(?:weight|bias))$")
_GATE = ".dense.gate.weight"
Read = Callable[[], Tensor]


def merge(sources: Sequence[Source], weights: Sequence[float], method: Method) -> M3Encoder:
    """The average of ``sources`` by ``weights``, computed in float32, in the dtype of the last of them.

    Raises:
        UserError: tensors are missing or differ in shape.
    """
    mould = next((source for source in reversed(sources) if source.experts), sources[-1])
    stored = [StoredTensors(source.folder) for source in sources]
    backbone = load_backbone(mould.folder, dtype=stored[-1].dtype)
    for names, target in _by_place(backbone).items():
        reads: list[tuple[Source, Read]] = []
        for source, tensors in zip(sources, stored, strict=True):
            if names[0].endswith(_GATE) and source.experts is None:
                continue
            plain = [] if source.experts else [_EXPERT.sub(r"\1\2", name) for name in names]
            reads.append((source, lambda tensors=tensors, wanted=(*names, *plain): tensors.get(*wanted)))  # type: ignore[misc]
        _average(target, names[0], reads, sources, weights, method)
    colbert, sparse = _heads(sources, weights, method, backbone.config.hidden_size)
    return M3Encoder(
        backbone,
        colbert_linear=colbert,
        sparse_linear=sparse,
        pooling=agreed(sources, "pooling", [source.stored.pooling for source in sources]) or "cls",
        normalize=_or_true(agreed(sources, "normalize", [source.stored.normalize for source in sources])),
        projections=_projections(sources, weights, method, backbone.config.hidden_size),
        instructions=next(
            (each.stored.instructions for each in sources if each.stored.instructions != NO_INSTRUCTIONS),
            NO_INSTRUCTIONS,
        ),
    )


def write(model: M3Encoder, sources: Sequence[Source], folder: Path) -> None:
    """The checkpoint, with the last source's tokenizer."""
    save_checkpoint(model, folder, tokenizer=load_tokenizer(sources[-1].folder))


def _or_true(value: bool | None) -> bool:
    return True if value is None else value


def _by_place(backbone: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """The model's floating-point tensors, each once, by all names it has (T5's embeddings have two)."""
    names: dict[int, list[str]] = {}
    state = {key: value for key, value in backbone.state_dict().items() if value.is_floating_point()}
    for key, value in state.items():
        names.setdefault(value.data_ptr(), []).append(key)
    return {tuple(keys): state[keys[0]] for keys in names.values()}


def _average(
    target: Tensor, name: str, reads: Sequence[tuple[Source, Read]], sources: Sequence[Source],
    weights: Sequence[float], method: Method,
) -> None:  # fmt: skip
    """Put into ``target`` the average of those who have this tensor, their weights scaled to a sum of 1."""
    weight_of = {id(source): weight for source, weight in zip(sources, weights, strict=True)}
    shares = [weight_of[id(source)] for source, _ in reads]
    whole = sum(shares)
    if len(reads) < len(sources):
        shares = [share / whole for share in shares] if whole else [1 / len(shares)] * len(shares)
    taking = [(source, read, share) for (source, read), share in zip(reads, shares, strict=True) if share]
    tensors = [read() for _, read, _ in taking]
    for (source, _, _), tensor in zip(taking, tensors, strict=True):
        if tensor.shape != target.shape:
            raise UsageError(
                f"{source.name} cannot be averaged with {sources[-1].name}: {name} is {list(tensor.shape)}, expected "
                f"{list(target.shape)}; give checkpoints that were trained from one base"
            )
    with torch.no_grad():
        target.copy_(combine(tensors, [share for _, _, share in taking], method))


def _heads(
    sources: Sequence[Source], weights: Sequence[float], method: Method, hidden_size: int
) -> tuple[nn.Linear | None, nn.Linear | None]:
    """The colbert and the sparse head, or None where no source has them."""
    having = [source for source in sources if load_heads(source.folder, hidden_size)[2]]
    if not having:
        return None, None
    if len(having) < len(sources):
        logger.info("sparse and colbert heads are those of %s alone", " and ".join(each.name for each in having))
    colbert, sparse, _ = load_heads(having[-1].folder, hidden_size)
    for name, head in (("colbert", colbert), ("sparse", sparse)):
        for key, target in head.state_dict().items():
            files = [source.folder / HEAD_FILES[name] for source in having]
            reads = [(each, _reader(file, key)) for each, file in zip(having, files, strict=True)]
            _average(target, f"{name}_linear.{key}", reads, sources, weights, method)
    return colbert, sparse


def _reader(file: Path, key: str) -> Read:
    return lambda: read_state(file)[key]


def _projections(
    sources: Sequence[Source], weights: Sequence[float], method: Method, hidden_size: int
) -> list[Projection]:
    modules = [load_projections(source.stored.dense, hidden_size) for source in sources]
    for number, target in enumerate(modules[-1]):
        states = [own[number].state_dict() for own in modules]
        agreed(sources, f"Dense module {number}", [str(own[number].said) for own in modules])
        for key, value in target.state_dict().items():
            reads: list[tuple[Source, Read]] = [
                (source, lambda state=state, key=key: state[key].clone())  # type: ignore[misc]
                for source, state in zip(sources, states, strict=True)
            ]
            _average(value, key, reads, sources, weights, method)
    return modules[-1]
