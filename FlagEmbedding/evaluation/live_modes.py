"""Search by several modes for a model that is in memory: what steps 0 and 1 give with ``--modes`` and their defaults.

Passages go through the model once for dense vectors (as without other modes, so that the dense figures stay) and once
for lexical weights and colbert vectors. The main process keeps all of these while it searches: 8 bytes per distinct
token of a passage, and for colbert 2 bytes per number of every token's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from FlagEmbedding.indexing.arguments import ModeArguments
from FlagEmbedding.indexing.retriever import inner_products
from FlagEmbedding.inference.lexical import TokenWeights, token_weights
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.inference.tokenization import TokenRows
from FlagEmbedding.retrieval.candidates import Asked, find
from FlagEmbedding.retrieval.fusion import Fusing, fuse
from FlagEmbedding.retrieval.late_interaction import rerank, stored_vectors
from FlagEmbedding.retrieval.lexical import Postings, postings_in_memory
from FlagEmbedding.retrieval.memory import MemoryIndex
from FlagEmbedding.retrieval.searcher import Hit, search
from FlagEmbedding.utils.distributed import is_main, world_size
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.modes import Mode, Part, parse_modes, parts_of


class Tokens(Protocol):
    """This process's share of some texts, in windows of tokens."""

    @property
    def max_length(self) -> int: ...
    @property
    def own(self) -> dict[int, TokenRows]: ...
    def vectors(self, encoder: TextEncoder) -> np.ndarray | None: ...


@dataclass(frozen=True)
class _Rows:
    """Lexical weights and colbert vectors (half precision, end to end) of all texts."""

    weights: TokenWeights
    offsets: np.ndarray
    numbers: np.ndarray

    def vectors(self, row: int) -> np.ndarray:
        """``[tokens, width]`` float32 of one text."""
        return self.numbers[self.offsets[row] : self.offsets[row + 1]].astype(np.float32)


def live_modes(given: Sequence[str], flag: str = "--eval_modes") -> list[Mode]:
    """The modes that a training run can evaluate. Raises ``UsageError``."""
    modes = parse_modes(given, flag)
    for mode in modes:
        if "bm25" in mode.parts or mode.fusion == "tuned":
            why = "BM25 knows no model" if "bm25" in mode.parts else "there are no queries to tune weights by"
            raise UsageError(f"{flag} {mode.name}: {why}: score it by steps 0 to 2")
    return modes


def search_modes(
    name: str, docids: Sequence[str], queries: Tokens, passages: Tokens, encoder: TextEncoder, modes: Sequence[Mode],
    top_k: int,
) -> Callable[[], dict[Mode, list[list[Hit]]]]:  # fmt: skip
    """Encode everything, all processes together; what is returned searches, and is for the main process to call."""
    dense = queries.vectors(encoder), passages.vectors(encoder)
    how = _how()
    parts = parts_of([*modes, *(Mode((part,)) for mode in modes for part in how.searching(mode))])
    want: list[Kind] = [part for part in parts if part == "sparse" or part == "colbert"]
    rows = [_encode(each, encoder, want) for each in (queries, passages)] if want else []

    def found() -> dict[Mode, list[list[Hit]]]:
        asked_by, held = dense
        assert asked_by is not None and held is not None
        broken = np.flatnonzero(~np.isfinite(held).all(axis=1))
        if len(broken):
            raise DataError(f"{name}: the vector of passage {docids[broken[0]]!r} is not finite")
        index, threads = MemoryIndex(Path(name), docids, held), torch.get_num_threads()
        lexical: dict[Part, Callable[[int], np.ndarray]] = {}
        if "sparse" in want:
            lexical["sparse"] = _by_words(rows, docids)
        vectors = [rows[0].vectors(i) for i in range(len(asked_by))] if "colbert" in want else []
        asked = Asked(
            docids,
            len(asked_by),
            lambda depth: search(index, asked_by, depth, threads=threads, device=encoder.device),
            lambda query, own: inner_products(held[own], asked_by[query]),
            lexical,
            lambda _: [],  # colbert reranks here, and does not search by itself
            lambda own: rerank(vectors, own, stored_vectors(rows[1]), threads=threads, device=encoder.device),
        )
        every = find(asked, modes, how, top_k)
        return {mode: [fuse(mode, each, how, docids, top_k) for each in every] for mode in modes}

    return found


def _how() -> Fusing:
    """How step 1 joins modes by default."""
    told = ModeArguments()
    return Fusing(told.weights, told.rrf_k, told.rerank, tuple(parts_of(parse_modes(told.rerank_from))))


def _by_words(rows: Sequence[_Rows], docids: Sequence[str]) -> Callable[[int], np.ndarray]:
    asked, held = rows[0].weights.texts(), rows[1].weights
    postings: Postings = postings_in_memory(docids, held.lengths, held.ids, held.weights)
    return lambda query: postings.scores(asked[query])


def _encode(texts: Tokens, encoder: TextEncoder, want: Sequence[Kind]) -> _Rows:
    """Of all texts, on the main process; others get nothing. Every process must call this together."""
    own: dict[int, tuple[TokenWeights | None, np.ndarray | None, list[int]]] = {}
    skip = encoder.special_ids
    for number, tokens in texts.own.items():
        found = encoder.represent_rows(tokens, texts.max_length, want)
        weights = token_weights(found, skip) if "sparse" in want else None
        vectors = None if found.colbert is None else found.colbert.to(torch.float16).cpu().numpy()
        own[number] = weights, vectors, [length - 1 for length in tokens.lengths]
    every = [part for _, part in sorted(_gathered(own).items())]
    lengths = [length for _, _, some in every for length in some]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers = [vectors for _, vectors, _ in every if vectors is not None]
    weights = TokenWeights.cat([part for part, _, _ in every if part is not None])
    return _Rows(weights, offsets, np.concatenate(numbers) if numbers else np.empty((0, 0), np.float16))


def _gathered(own: Mapping[int, Any]) -> dict[int, Any]:
    """What every process has, on the main one."""
    if world_size() == 1 or not dist.is_initialized():
        return dict(own)
    parts: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(dict(own), parts, dst=0)
    return {number: part for some in parts or [] for number, part in some.items()}
