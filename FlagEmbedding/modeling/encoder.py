"""M3Encoder: a backbone and its heads, encoding several roles in one call with one of two engines.

``packed`` computes no padding: rows of all roles are sorted by length, cut into slabs of about ``slab_tokens`` tokens
and run through ``modeling.packed``. ``padded`` is the reference and the fallback: transformers' own forward on padded
rows, role by role. Both give the same numbers.

Shape legend: N rows, T tokens in all, D hidden size, Dc width of colbert vectors.
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
from FlagEmbedding.modeling.packed import WordTable, packed_forward, plan_slabs
from FlagEmbedding.modeling.pooling import check_method, pool_packed, pool_padded
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError

__all__ = ["KINDS", "SUB_BATCH_BY_LENGTH", "EngineConfig", "M3Encoder", "Representations"]

# Published table: rows at a time by padded length, the first line whose length is reached.
SUB_BATCH_BY_LENGTH = ((6000, 1), (5000, 2), (4000, 3), (3000, 3), (2000, 5), (1000, 9), (512, 16), (0, 32))
KINDS = frozenset({"dense", "sparse", "colbert"})


@dataclass
class Representations:
    """What one role's rows became.

    Attributes:
        tokens: the rows.
        dense: ``[N, D]`` or None.
        token_weights: ``[T]``, relu of the sparse head for every token, or None.
        colbert: ``[T - N, Dc]``, rows end to end without their first tokens, or None.
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
        normalize: L2-normalise dense and colbert vectors.
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

    def encode(self, batches: Sequence[TokenBatch], want: Sequence[Iterable[str]]) -> list[Representations]:
        """Encode several roles at once.

        Args:
            batches: the roles' rows.
            want: for each role, which of ``dense``, ``sparse``, ``colbert`` to compute.

        Returns:
            One ``Representations`` a role, rows in the given order, with gradients if enabled.
        """
        wants = [frozenset(kinds) for kinds in want]
        for kinds in wants:
            self._check_kinds(kinds)
        if len(wants) != len(batches):
            raise ValueError(f"want needs one set for each of the {len(batches)} batches, got {len(wants)}")
        if self.engine.engine == "padded":
            return [self._encode_padded(tokens, kinds) for tokens, kinds in zip(batches, wants, strict=True)]
        results: list[Representations | None] = [None] * len(batches)
        # Roles that want the same go through together; with one kind of want that is all of them.
        for kinds in sorted(set(wants), key=sorted):
            members = [i for i, wanted in enumerate(wants) if wanted == kinds]
            encoded = self._encode_packed([batches[i] for i in members], kinds)
            for i, representations in zip(members, encoded, strict=True):
                results[i] = representations
        return [result for result in results if result is not None]

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
        """Transformers' forward on padded rows, a slice at a time."""
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

    def _encode_packed(self, batches: Sequence[TokenBatch], kinds: frozenset[str]) -> list[Representations]:
        """All rows of ``batches`` sorted by length, slab after slab through ``modeling.packed``, order restored."""
        together = TokenBatch.cat(batches)
        slabs = plan_slabs(together.lengths, self.engine.slab_tokens)
        visited = [row for slab in slabs for row in slab]
        ordered = together.select(visited)
        caching = self.engine.grad_cache and torch.is_grad_enabled()
        trains_words = torch.is_grad_enabled() and self.model.get_input_embeddings().weight.requires_grad
        words = WordTable.of(self.model, ordered.ids) if trains_words and len(slabs) > 1 else None
        parts = []
        row = token = 0
        for slab in slabs:
            lengths = ordered.lengths[row : row + len(slab)]
            span = slice(token, token + sum(lengths))
            piece = TokenBatch(ordered.ids[span], lengths, ordered.padded_length)
            own = None if words is None else words._replace(places=words.places[span])
            if caching:
                # The non-reentrant kind: frozen first layers are no obstacle, and the recomputation sees the same
                # random numbers, so dropout and router noise repeat.
                parts.append(checkpoint(self._encode_slab, piece, kinds, own, use_reentrant=False))
            else:
                parts.append(self._encode_slab(piece, kinds, own))
            row, token = row + len(slab), span.stop
        joined = _reorder(_join(parts, ordered), visited)
        return _split(joined, batches)

    def _encode_slab(self, tokens: TokenBatch, kinds: frozenset[str], words: WordTable | None) -> Representations:
        first_rows_only = kinds == {"dense"} and self.pooling == "cls" and not self.all_rows
        states = packed_forward(self.model, tokens, first_rows_only=first_rows_only, words=words)
        dense = None
        if first_rows_only:
            dense = states
        elif "dense" in kinds:
            dense = pool_packed(states, tokens.lengths, self.pooling)
        return self._finish(tokens, dense, states, kinds)

    # ---- heads ----

    def _finish(
        self, tokens: TokenBatch, dense: Tensor | None, states: Tensor | None, kinds: frozenset[str]
    ) -> Representations:
        """Heads over the real tokens' ``states`` ``[T, D]``, and normalisation."""
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
    """Indices of all tokens but each row's first, ``[T - N]``."""
    keep = torch.ones(len(tokens.ids), dtype=torch.bool)
    keep[tokens.starts()[:-1]] = False
    return keep.nonzero().squeeze(-1).to(tokens.ids.device)


def _join(parts: Sequence[Representations], tokens: TokenBatch) -> Representations:
    """Parts of consecutive rows as one."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if values and values[0] is not None else None

    return Representations(tokens, cat("dense"), cat("token_weights"), cat("colbert"))


def _reorder(part: Representations, visited: Sequence[int]) -> Representations:
    """Rows that were computed in the order ``visited``, put back to 0, 1, 2, …"""
    place = [0] * len(visited)
    for position, row in enumerate(visited):
        place[row] = position
    device = part.tokens.ids.device

    def ragged(rows: Tensor | None, less: int) -> Tensor | None:
        if rows is None:
            return None
        pieces = rows.split([length - less for length in part.tokens.lengths])
        return torch.cat([pieces[position] for position in place])

    return Representations(
        tokens=part.tokens.select(place),
        dense=None if part.dense is None else part.dense.index_select(0, torch.tensor(place, device=device)),
        token_weights=ragged(part.token_weights, 0),
        colbert=ragged(part.colbert, 1),
    )


def _split(part: Representations, batches: Sequence[TokenBatch]) -> list[Representations]:
    """Cut rows back into the roles that they came from."""
    rows = [len(batch) for batch in batches]
    tokens = [len(batch.ids) for batch in batches]

    def cut(value: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
        return [None] * len(batches) if value is None else value.split(sizes)

    dense = cut(part.dense, rows)
    weights = cut(part.token_weights, tokens)
    colbert = cut(part.colbert, [t - n for t, n in zip(tokens, rows, strict=True)])
    return [Representations(*parts) for parts in zip(batches, dense, weights, colbert, strict=True)]
