"""Slabs of a window, side by side on a CPU's cores, each computed by one thread.

A matrix product that several threads share adds up in another order than one thread does, so its last bits depend on
the number of cores. Here the cores share out whole slabs instead: the vectors have the same bits on any number of
threads and processes, every slab stays in its core's cache, and no core waits for another inside a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from FlagEmbedding.modeling.encoder import M3Encoder, Representations
from FlagEmbedding.modeling.slabs import plan_slabs
from FlagEmbedding.modeling.tokens import TokenBatch

FILL = 32  # on a CPU, a slab's tokens are a multiple of this


def plan(lengths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Row numbers of each slab, longest rows first; for the padded engine the budget counts padding too."""
    if not padded:
        return plan_slabs(lengths, budget)
    slabs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not slabs or (len(slabs[-1]) + 1) * lengths[slabs[-1][0]] > budget:
            slabs.append([])
        slabs[-1].append(row)
    return slabs


def encode_in_slabs(encoder: M3Encoder, tokens: TokenBatch, want: set[str], slabs: list[list[int]]) -> Representations:
    """Representations of ``tokens`` in their order, each slab by a forward of its own."""
    order = [row for slab in slabs for row in slab]
    rows = tokens.ids.split(tokens.lengths)
    batches = [
        TokenBatch(torch.cat([rows[row] for row in slab]), lengths := [tokens.lengths[row] for row in slab], lengths[0])
        for slab in slabs
    ]
    packed = encoder.engine.engine == "packed"
    if packed and tokens.ids.device.type == "cpu":
        batches = [_filled(batch) for batch in batches]

    def encode(batch: TokenBatch) -> Representations:
        with torch.inference_mode():
            return encoder.encode([batch], [want])[0]

    with _slab_threads(len(slabs), tokens.ids.device) as pool:
        parts = list(map(encode, batches) if pool is None else pool.map(encode, batches))
    place = sorted(range(len(order)), key=order.__getitem__)

    def restore(name: str, less: int | None) -> Tensor | None:
        """Rows of one kind back in order; a row holds its tokens less ``less``, or one row (None)."""
        pieces: list[Tensor] = []
        for part, batch, slab in zip(parts, batches, slabs, strict=True):
            value = getattr(part, name)
            if value is None:
                return None
            each = value.split(1 if less is None else [length - less for length in batch.lengths])
            pieces.extend(each[: len(slab)])
        return torch.cat([pieces[i] for i in place])

    return Representations(tokens, restore("dense", None), restore("token_weights", 0), restore("colbert", 1))


def _filled(batch: TokenBatch) -> TokenBatch:
    """The slab and, where its tokens are no multiple of ``FILL``, one more row of as many as are missing.

    oneDNN compiles code for every number of rows that it meets: in bf16 that takes longer than the product, in fp32 a
    few percent of it. Rows do not see each other, so the row more changes none of them.
    """
    missing = -len(batch.ids) % FILL
    if not missing:
        return batch
    ids = torch.cat([batch.ids, batch.ids[-1:].expand(missing)])
    return TokenBatch(ids, [*batch.lengths, missing], max(batch.padded_length, missing))


@contextmanager
def _slab_threads(slabs: int, device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that compute with one thread each, as many as torch may use; None where one does all the work."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield None
        return
    try:
        # Also for a single slab: its bits must not depend on how many threads there are.
        with ThreadPoolExecutor(min(threads, slabs), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # parts of torch keep this number for the whole process
