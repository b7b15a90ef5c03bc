"""M3Encoder: a backbone and its heads, encoding several roles in one call with one of two engines.

``packed`` computes no padding: the sequences of all roles are sorted by length, cut into slabs (``modeling.slabs``) and
run through ``modeling.packed``. ``padded`` is the reference and the fallback: transformers' own forward on padded
sequences, role by role. Both give the same numbers.

Shape legend: N sequences, T tokens in all, D hidden size, Dc width of colbert vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from FlagEmbedding.modeling.moe import token_mask
from FlagEmbedding.modeling.options import EngineConfig
from FlagEmbedding.modeling.packed import WordTable, compiled_for_all, packed_forward
from FlagEmbedding.modeling.pooling import check_method, pool_packed, pool_padded
from FlagEmbedding.modeling.slabs import Slabs, each_on_one_thread, fill_price
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError

__all__ = ["KINDS", "SUB_BATCH_BY_LENGTH", "EngineConfig", "M3Encoder", "Representations"]

# Published table: sequences at a time by padded length, the first line whose length is reached.
SUB_BATCH_BY_LENGTH = ((6000, 1), (5000, 2), (4000, 3), (3000, 3), (2000, 5), (1000, 9), (512, 16), (0, 32))
KINDS = frozenset({"dense", "sparse", "colbert"})


@dataclass
class Representations:
    """What one role's sequences became.

    Attributes:
        tokens: the sequences.
        dense: ``[N, D]`` or None.
        token_weights: ``[T]``, relu of the sparse head for every token, or None.
        colbert: ``[T - N, Dc]``, sequences end to end without their first tokens, or None.
    """

    tokens: TokenBatch
    dense: Tensor | None = None
    token_weights: Tensor | None = None
    colbert: Tensor | None = None

    def colbert_padded(self) -> tuple[Tensor, Tensor]:
        """Colbert vectors as ``[N, padded_length - 1, Dc]``, zeros at padding, and their bool mask."""
        if self.colbert is None:
            raise ValueError("colbert vectors were not asked for")
        mask = self.tokens.mask()[:, 1:]
        padded = self.colbert.new_zeros(*mask.shape, self.colbert.shape[-1])
        # index_put keeps the gradient; rows of ``mask`` run in the order of ``colbert``.
        return padded.index_put(mask.nonzero(as_tuple=True), self.colbert), mask


class M3Encoder(nn.Module):
    """A backbone with optional sparse and colbert heads.

    Args:
        model: the backbone, without pooler.
        colbert_linear: ``[D, Dc]`` head or None.
        sparse_linear: ``[D, 1]`` head or None.
        pooling: ``cls`` or ``mean``.
        normalize: L2-normalize dense and colbert vectors.
        engine: how to compute; None for the defaults.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        colbert_linear: nn.Linear | None = None,
        sparse_linear: nn.Linear | None = None,
        pooling: str = "cls",
        normalize: bool = True,
        engine: EngineConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.colbert_linear = colbert_linear
        self.sparse_linear = sparse_linear
        self.pooling = check_method(pooling)
        self.normalize = normalize
        self.engine = engine or EngineConfig()
        # The packed engine computes the last layer for first tokens alone where nothing else is read. A router loss
        # reads the routing of all tokens, and sets this.
        self.all_rows = False

    def encode(
        self, batches: Sequence[TokenBatch], want: Sequence[Iterable[str]], slab_tokens: int | None = None
    ) -> list[Representations]:
        """Encode several roles at once.

        Args:
            batches: the roles' sequences.
            want: for each role, which of ``dense``, ``sparse``, ``colbert`` to compute.
            slab_tokens: packed: another token budget of a slab than the engine's.

        Returns:
            ``Representations`` per role, sequences in the given order, with gradients if enabled.
        """
        wants = [frozenset(kinds) for kinds in want]
        for kinds in wants:
            self._check_kinds(kinds)
        if len(wants) != len(batches):
            raise ValueError(f"want needs one set for each of the {len(batches)} batches, got {len(wants)}")
        if self.engine.engine == "padded":
            return [self._encode_padded(tokens, kinds) for tokens, kinds in zip(batches, wants, strict=True)]
        budget = self.engine.slab_tokens if slab_tokens is None else slab_tokens
        results: dict[int, Representations] = {}
        # Roles that want the same go through together; with one kind of want that is all of them.
        for kinds in sorted(set(wants), key=sorted):
            members = [i for i, wanted in enumerate(wants) if wanted == kinds]
            roles = [batches[i] for i in members]
            together = TokenBatch.cat(roles)
            found = _join(self._encode_packed(slabs := Slabs(together, budget), kinds), together, slabs.place)
            results |= zip(members, _split(found, roles), strict=True)
        return [results[i] for i in range(len(batches))]

    def infer(self, tokens: TokenBatch, want: Iterable[str], slab_tokens: int) -> Representations:
        """Encode a batch without gradients, in slabs; on a CPU with the same bits on any number of threads.

        Args:
            tokens: the sequences.
            want: which of ``dense``, ``sparse``, ``colbert`` to compute.
            slab_tokens: token budget of a slab; with the padded engine it counts padding.
        """
        self._check_kinds(kinds := frozenset(want))
        padded = self.engine.engine == "padded"
        weight = next(self.parameters())
        compiles_by_size = weight.device.type == "cpu" and not padded and not compiled_for_all(self.model)
        price = fill_price(weight.dtype) if compiles_by_size else 0.0
        slabs = Slabs(tokens, slab_tokens, padded, price)

        def one(slab: TokenBatch) -> Representations:
            with torch.inference_mode():  # a thread's own state
                return self._encode_padded(slab, kinds) if padded else self._encode_slab(slab, kinds, None)

        with torch.inference_mode():
            return _join(each_on_one_thread(one, slabs.batches, weight.device), tokens, slabs.place)

    def _check_kinds(self, kinds: frozenset[str]) -> None:
        if not kinds or not kinds <= KINDS:
            raise ValueError(f"want must name some of {sorted(KINDS)}, got {sorted(kinds)}")
        for kind, head in (("sparse", self.sparse_linear), ("colbert", self.colbert_linear)):
            if kind in kinds and head is None:
                raise UsageError(
                    f"{kind} vectors need the checkpoint's {kind}_linear head, which it does not have: train with "
                    "unified_finetuning, or ask for dense vectors alone"
                )

    # ---- padded engine ----

    def _encode_padded(self, tokens: TokenBatch, kinds: frozenset[str]) -> Representations:
        """Transformers' forward on padded sequences, a slice at a time."""
        rows = len(tokens)
        size = rows
        if self.engine.enable_sub_batch:
            size = next(size for length, size in SUB_BATCH_BY_LENGTH if tokens.padded_length >= length)
        parts = []
        for start in range(0, rows, max(size, 1)):
            piece = tokens.select(range(start, min(start + size, rows)))
            ids, mask = piece.pad(self._pad_id())
            real = mask.bool()
            with token_mask(self.model, real):
                hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [n, L, D]
            dense = pool_padded(hidden, mask, self.pooling) if "dense" in kinds else None
            states = hidden[real] if kinds - {"dense"} else None
            parts.append(self._finish(piece, dense, states, kinds))
        return _join(parts, tokens)

    def _pad_id(self) -> int:
        pad_id = self.model.config.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    # ---- packed engine ----

    def _encode_packed(self, slabs: Slabs, kinds: frozenset[str]) -> list[Representations]:
        """Slab after slab through ``modeling.packed``, with gradients if enabled."""
        caching = self.engine.grad_cache and torch.is_grad_enabled()
        trains_words = torch.is_grad_enabled() and self.model.get_input_embeddings().weight.requires_grad
        words: list[WordTable | None] = [None] * len(slabs.batches)
        if trains_words and len(words) > 1:
            words = [*WordTable.of_slabs(self.model, [slab.ids for slab in slabs.batches])]
        if not caching:
            return [self._encode_slab(slab, kinds, own) for slab, own in zip(slabs.batches, words, strict=True)]
        # The non-reentrant kind: frozen first layers are no obstacle, and the recomputation sees the same random
        # numbers, so dropout and router noise repeat.
        return [
            checkpoint(self._encode_slab, slab, kinds, own, use_reentrant=False)
            for slab, own in zip(slabs.batches, words, strict=True)
        ]

    def _encode_slab(self, tokens: TokenBatch, kinds: frozenset[str], words: WordTable | None) -> Representations:
        first_tokens_only = kinds == {"dense"} and self.pooling == "cls" and not self.all_rows
        states = packed_forward(self.model, tokens, first_tokens_only=first_tokens_only, words=words)
        dense = None
        if first_tokens_only:
            dense = states
        elif "dense" in kinds:
            dense = pool_packed(states, tokens.lengths, self.pooling)
        return self._finish(tokens, dense, states, kinds)

    # ---- heads ----

    def _finish(
        self, tokens: TokenBatch, dense: Tensor | None, states: Tensor | None, kinds: frozenset[str]
    ) -> Representations:
        """Heads over the real tokens' ``states`` ``[T, D]``, and normalization."""
        result = Representations(tokens)
        if dense is not None:
            result.dense = F.normalize(dense, dim=-1) if self.normalize else dense
        if states is not None and "sparse" in kinds and self.sparse_linear is not None:
            result.token_weights = torch.relu(self.sparse_linear(states)).squeeze(-1)
        if states is not None and "colbert" in kinds and self.colbert_linear is not None:
            later = _not_first(tokens)
            vectors = self.colbert_linear(states.index_select(0, later))
            result.colbert = F.normalize(vectors, dim=-1) if self.normalize else vectors
        return result


def _not_first(tokens: TokenBatch) -> Tensor:
    """Indices of all tokens but each sequence's first, ``[T - N]``."""
    keep = torch.ones(len(tokens.ids), dtype=torch.bool)
    keep[tokens.starts()[:-1]] = False
    return keep.nonzero().squeeze(-1).to(tokens.ids.device)


def _join(parts: Sequence[Representations], tokens: TokenBatch, place: Sequence[int] | None = None) -> Representations:
    """The parts' sequences as those of ``tokens``: sequence i is number ``place[i]`` of the parts' (None: the same)."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if values and values[0] is not None else None

    dense, weights, colbert = cat("dense"), cat("token_weights"), cat("colbert")
    if place is None:
        return Representations(tokens, dense, weights, colbert)
    lengths = [length for part in parts for length in part.tokens.lengths]

    def ragged(vectors: Tensor | None, less: int) -> Tensor | None:
        if vectors is None:
            return None
        pieces = vectors.split([length - less for length in lengths])  # type: ignore[no-untyped-call]
        return torch.cat([pieces[position] for position in place])

    if dense is not None:
        dense = dense.index_select(0, torch.tensor(place, device=dense.device))
    return Representations(tokens, dense, ragged(weights, 0), ragged(colbert, 1))


def _split(part: Representations, batches: Sequence[TokenBatch]) -> list[Representations]:
    """Cut the sequences back into the roles that they came from."""
    counts = [len(batch) for batch in batches]
    tokens = [len(batch.ids) for batch in batches]

    def cut(value: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
        return [None] * len(batches) if value is None else list(value.split(sizes))  # type: ignore[no-untyped-call]

    dense = cut(part.dense, counts)
    weights = cut(part.token_weights, tokens)
    colbert = cut(part.colbert, [t - n for t, n in zip(tokens, counts, strict=True)])
    return [Representations(*parts) for parts in zip(batches, dense, weights, colbert, strict=True)]
