"""M3Encoder: a backbone and its heads, encoding several roles in one call with one of two engines.

``packed`` computes no padding: the sequences of all roles are sorted by length, cut into slabs (``modeling.slabs``) and
run through ``modeling.packed``. ``padded`` is the reference and the fallback: transformers' own forward on padded
sequences, role by role. Both give the same numbers.

Shape legend: N sequences, T tokens in all, D hidden size, Dc width of colbert vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from FlagEmbedding.modeling.families import own_forward, pad_id, try_out
from FlagEmbedding.modeling.interchange import NO_INSTRUCTIONS, Instructions
from FlagEmbedding.modeling.moe import token_mask
from FlagEmbedding.modeling.options import MOST_SLAB_TOKENS, SLAB_TOKENS, EngineConfig
from FlagEmbedding.modeling.packed import WordTable, compiled_for_all, packed_forward
from FlagEmbedding.modeling.pooling import check_method, pool_packed, pool_padded
from FlagEmbedding.modeling.projections import Projection
from FlagEmbedding.modeling.representations import Representations, join, split
from FlagEmbedding.modeling.slabs import Layout, Slabs, each_on_one_thread, fill_price
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import gather_counts
from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.hardware import tokens_that_fit
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

__all__ = ["KINDS", "SUB_BATCH_BY_LENGTH", "EngineConfig", "M3Encoder", "Representations"]

# Published table: sequences at a time by padded length, the first line whose length is reached.
SUB_BATCH_BY_LENGTH = ((6000, 1), (5000, 2), (4000, 3), (3000, 3), (2000, 5), (1000, 9), (512, 16), (0, 32))
KINDS = frozenset({"dense", "sparse", "colbert"})


class M3Encoder(nn.Module):
    """A backbone with optional sparse and colbert heads.

    Args:
        model: the backbone, without pooler.
        colbert_linear: ``[D, Dc]`` head or None.
        sparse_linear: ``[D, 1]`` head or None.
        pooling: ``cls``, ``mean`` or ``last_token``.
        normalize: L2-normalize dense and colbert vectors.
        engine: how to compute; None for the defaults. What the encoder does not bear becomes ``padded``, in one line.
        projections: ``Dense`` modules between pooling and normalization.
        instructions: what is put before texts; written into the checkpoint.

    Raises:
        UsageError: the backbone encodes no text, or ``cls`` of a causal one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        colbert_linear: nn.Linear | None = None,
        sparse_linear: nn.Linear | None = None,
        pooling: str = "cls",
        normalize: bool = True,
        engine: EngineConfig | None = None,
        projections: Iterable[Projection] = (),
        instructions: Instructions = NO_INSTRUCTIONS,
    ) -> None:
        super().__init__()
        self.model = model
        self.colbert_linear = colbert_linear
        self.sparse_linear = sparse_linear
        self.pooling = check_method(pooling)
        self.normalize = normalize
        self.projections = nn.ModuleList(projections)
        self.instructions = instructions
        self.engine, self.equal_lengths = self._fitting_engine(engine or EngineConfig())
        # The packed engine computes the last layer for first tokens alone where nothing else is read. A router loss
        # reads the routing of all tokens, and sets this.
        self.all_rows = False
        self.slab_limit: int | None = None  # tokens at a time that a device's memory has shown to hold
        self.sharded = False  # the weights are divided over processes (modeling.sharding)

    def _fitting_engine(self, asked: EngineConfig) -> tuple[EngineConfig, bool]:
        """``asked``, or the padded engine; and whether only sequences of equal length may go together."""
        family = try_out(self.model, packed=asked.engine == "packed")
        name = type(self.model).__name__
        if family.causal and self.pooling == "cls":
            raise UsageError(
                f"{name} is causal: its first token sees no other, so cls gives every text the same vector; use "
                "last_token (or mean) pooling"
            )
        if asked.engine == "packed" and family.way != "packed":
            if asked.grad_cache:
                raise UsageError(f"--grad_cache needs the packed engine, which {name} does not run on: {family.note}")
            logger.warning("%s runs on --engine padded, its own forward: %s", name, family.note)
            asked = replace(asked, engine="padded")
        if family.way == "equal lengths":
            logger.warning("%s: padding would change its vectors, so only texts of equal length run together", name)
        return asked, family.way == "equal lengths"

    @property
    def dimension(self) -> int:
        """Dimensions of a dense vector."""
        last: Any = self.projections[-1] if len(self.projections) else None
        return int(self.model.config.hidden_size if last is None else last.linear.out_features)

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
            idle = self._idle_forwards(sum(len(self._pieces(tokens)) for tokens in batches))
            padded = [self._encode_padded(tokens, kinds) for tokens, kinds in zip(batches, wants, strict=True)]
            return self._idle(padded, idle)
        budget = self._budget() if slab_tokens is None else slab_tokens
        # Roles that want the same go through together; with one kind of want that is all of them.
        groups = {kinds: [i for i, own in enumerate(wants) if own == kinds] for kinds in sorted(set(wants), key=sorted)}
        together = {kinds: TokenBatch.cat([batches[i] for i in members]) for kinds, members in groups.items()}
        slabs = {kinds: Slabs(tokens, budget) for kinds, tokens in together.items()}
        idle = self._idle_forwards(sum(len(own.batches) for own in slabs.values()))
        results: dict[int, Representations] = {}
        for kinds, members in groups.items():
            own = slabs[kinds]
            found = join(self._encode_packed(own, kinds), together[kinds], own.place, own.places)
            results |= zip(members, split(found, [batches[i] for i in members]), strict=True)
        return self._idle([results[i] for i in range(len(batches))], idle)

    def _budget(self) -> int:
        """The engine's token budget of a slab, chosen at the first use where the options leave it open."""
        if self.engine.slab_tokens is None:
            config: Any = self.model.config
            weight = next(self.parameters())
            layers, hidden = config.num_hidden_layers, config.hidden_size
            # What the layers keep for the backward, in half precision: about 10 vectors and 3 wide ones per token.
            each = 2 * layers * (10 * hidden + 3 * getattr(config, "intermediate_size", 4 * hidden))
            tokens = tokens_that_fit(weight.device, each, MOST_SLAB_TOKENS, SLAB_TOKENS)
            self.engine = replace(self.engine, slab_tokens=tokens)
        assert self.engine.slab_tokens is not None
        return self.engine.slab_tokens

    def encode_alone(self, tokens: TokenBatch) -> Representations:
        """Dense vectors of one batch, outside of a forward: what FSDP has divided is gathered for it."""
        return self.encode([tokens], [{"dense"}])[0]

    def _idle_forwards(self, forwards: int) -> int:
        """How many forwards more than this process's ``forwards`` another one runs, where the weights are sharded.

        Each forward gathers every layer's weights from all processes, so the numbers must be equal, whatever each
        process's rows are.
        """
        if not self.sharded:
            return 0
        every = gather_counts([forwards], next(self.parameters()).device)
        return max(own for (own,) in every) - forwards

    def _idle(self, results: list[Representations], times: int) -> list[Representations]:
        """``results``, after the shortest sequence was encoded so many ``times`` for nothing."""
        if not times:
            return results
        first = next(each for each in results if len(each.tokens.lengths))
        shortest = first.tokens.select([first.tokens.lengths.index(min(first.tokens.lengths))])
        for _ in range(times):
            if self.engine.engine == "padded":
                idle = self._encode_padded(shortest, frozenset({"dense"}))
            else:
                slabs = Slabs(shortest, 0)
                idle = self._encode_slab(slabs.batches[0], slabs.layouts[0], frozenset({"dense"}), None)
            if first.dense is not None and idle.dense is not None:
                first.dense = first.dense + 0 * idle.dense.sum()
        return results

    def infer(self, tokens: TokenBatch, want: Iterable[str], slab_tokens: int) -> Representations:
        """Encode a batch without gradients, in slabs; on a CPU with the same bits on any number of threads.

        Where a device's memory does not hold a slab, this batch and later ones go through in slabs of half the size.

        Args:
            tokens: the sequences.
            want: which of ``dense``, ``sparse``, ``colbert`` to compute.
            slab_tokens: token budget of a slab; with the padded engine it counts padding.

        Raises:
            UserError: a single sequence is too much for the device's memory.
        """
        self._check_kinds(kinds := frozenset(want))
        while True:
            budget = min(slab_tokens or len(tokens.ids), self.slab_limit or slab_tokens or len(tokens.ids))
            try:
                return self._infer(tokens, kinds, budget)
            except torch.OutOfMemoryError as error:
                longest = max(tokens.lengths)
                if budget <= longest:
                    raise UserError(
                        f"out of memory on {tokens.ids.device} with a single text of {longest} tokens: cut texts "
                        "earlier, or use a device with more memory"
                    ) from error
                self.slab_limit = max(longest, min(budget, len(tokens.ids)) // 2)
            # Outside of the except block, which would hold on to the failed call's tensors.
            torch.cuda.empty_cache()
            logger.warning(
                "out of memory with %d tokens at a time: going on with %d",
                min(budget, len(tokens.ids)),
                self.slab_limit,
            )

    def _infer(self, tokens: TokenBatch, kinds: frozenset[str], slab_tokens: int) -> Representations:
        padded = self.engine.engine == "padded"
        weight = next(self.parameters())
        compiles_by_size = weight.device.type == "cpu" and not padded and not compiled_for_all(self.model)
        price = fill_price(weight.dtype) if compiles_by_size else 0.0
        slabs = Slabs(tokens, slab_tokens, padded, price)

        def one(slab: TokenBatch, layout: Layout) -> Representations:
            with torch.inference_mode():  # a thread's own state
                if padded:
                    return self._encode_padded(slab, kinds)
                return self._encode_slab(slab, layout, kinds, None)

        with torch.inference_mode():
            parts = each_on_one_thread(one, slabs.batches, slabs.layouts, weight.device)
            return join(parts, tokens, slabs.place, slabs.places)

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
        parts, order = [], []
        for chosen in self._pieces(tokens):
            piece = tokens.select(chosen)
            ids, mask = piece.pad(pad_id(self.model), max(piece.lengths) if self.equal_lengths else None)
            real = mask.bool()
            with token_mask(self.model, real):
                hidden = own_forward(self.model, ids, mask)  # [n, L, D]
            dense = pool_padded(hidden, mask, self.pooling) if "dense" in kinds else None
            states = hidden[real] if kinds - {"dense"} else None
            parts.append(self._finish(piece, dense, states, kinds))
            order += chosen
        place = sorted(range(len(order)), key=order.__getitem__) if self.equal_lengths else None
        return join(parts, tokens, place)

    def _pieces(self, tokens: TokenBatch) -> list[list[int]]:
        """Which sequences the padded engine takes at a time."""
        size = max(len(tokens), 1)
        if self.engine.enable_sub_batch:
            size = next(size for length, size in SUB_BATCH_BY_LENGTH if tokens.padded_length >= length)
        groups = [list(range(len(tokens)))]
        if self.equal_lengths:
            groups = [[i for i, own in enumerate(tokens.lengths) if own == each] for each in sorted({*tokens.lengths})]
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    # ---- packed engine ----

    def _encode_packed(self, slabs: Slabs, kinds: frozenset[str]) -> list[Representations]:
        """Slab after slab through ``modeling.packed``, with gradients if enabled."""
        caching = self.engine.grad_cache and torch.is_grad_enabled()
        trains_words = torch.is_grad_enabled() and self.model.get_input_embeddings().weight.requires_grad
        words: list[WordTable | None] = [None] * len(slabs.batches)
        if trains_words and len(words) > 1:
            words = [*WordTable.of_slabs(self.model, [slab.ids for slab in slabs.batches])]
        pieces = zip(slabs.batches, slabs.layouts, words, strict=True)
        if not caching:
            return [self._encode_slab(slab, layout, kinds, own) for slab, layout, own in pieces]

        def again(ids: Tensor, slab: TokenBatch, layout: Layout, own: WordTable | None) -> Representations:
            return self._encode_slab(replace(slab, ids=ids), layout, kinds, own)

        # The non-reentrant kind: frozen first layers are no obstacle. The ids are handed over as a tensor, since torch
        # keeps a device's random state only for tensors among the arguments: the recomputation sees the same random
        # numbers, so dropout and router noise repeat.
        return [checkpoint(again, slab.ids, slab, layout, own, use_reentrant=False) for slab, layout, own in pieces]

    def _encode_slab(
        self, tokens: TokenBatch, layout: Layout, kinds: frozenset[str], words: WordTable | None
    ) -> Representations:
        first_tokens_only = kinds == {"dense"} and self.pooling == "cls" and not self.all_rows
        states = packed_forward(self.model, tokens, first_tokens_only=first_tokens_only, words=words, layout=layout)
        dense = None
        if first_tokens_only:
            dense = states
        elif "dense" in kinds:
            dense = pool_packed(states, layout, self.pooling)
        return self._finish(tokens, dense, states, kinds, layout)

    # ---- heads ----

    def _finish(
        self,
        tokens: TokenBatch,
        dense: Tensor | None,
        states: Tensor | None,
        kinds: frozenset[str],
        layout: Layout | None = None,
    ) -> Representations:
        """Heads over the real tokens' ``states`` ``[T, D]``, and normalization."""
        result = Representations(tokens)
        if dense is not None:
            for projection in self.projections:
                dense = projection(dense)
            result.dense = F.normalize(dense, dim=-1) if self.normalize else dense
        if states is not None and "sparse" in kinds and self.sparse_linear is not None:
            result.token_weights = torch.relu(self.sparse_linear(states)).squeeze(-1)
        if states is not None and "colbert" in kinds and self.colbert_linear is not None:
            layout = Layout(tokens.lengths, tokens.ids.device) if layout is None else layout
            vectors = self.colbert_linear(states.index_select(0, layout.not_first))
            result.colbert = F.normalize(vectors, dim=-1) if self.normalize else vectors
        return result
