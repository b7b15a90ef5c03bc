"""Slabs, and how the sequences of one lie.

A slab is a micro-batch by token budget: sequences of a batch, without padding, that go through the encoder together.
Linear layers see it as one matrix of tokens, so its size is chosen for the machine (2 thousand tokens stay in a
processor's cache, a GPU wants many more). Attention runs over groups of sequences of exactly equal length, which need
no mask; sequences sorted by length make such groups long.

Shape legend: N sequences, T tokens in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from FlagEmbedding.modeling.tokens import TokenBatch, offsets
from FlagEmbedding.utils.hardware import onednn_takes_bf16, send

R = TypeVar("R")
FILL = 32  # tokens of a filled slab, and of a filled expert, are a multiple of this


def plan_slabs(lengths: Sequence[int], budget: int, padded: bool = False) -> list[list[int]]:
    """Cut a batch into slabs, longest sequences first.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens in a slab (a longer sequence goes alone); 0 puts all sequences into one slab.
        padded: padding up to a slab's longest sequence counts too.

    Returns:
        Numbers of the sequences in each slab, by descending length; equal lengths keep their order. No slab is empty.
    """
    slabs: list[list[int]] = []
    used = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        cost = lengths[slabs[-1][0]] if padded and slabs else lengths[number]
        if not slabs or 0 < budget < used + cost:
            slabs.append([])
            used, cost = 0, lengths[number]
        slabs[-1].append(number)
        used += cost
    return slabs


def fill_price(dtype: torch.dtype) -> float:
    """What filling a slab up may cost on a CPU, as a share of its tokens.

    oneDNN compiles code for every number of rows of a product, and keeps it for the next product of that size. In bf16
    on a processor that has it (AVX-512, AMX) compiling takes longer than the product, and products of 15 rows and of 32
    take nearly the same time: filling always pays. In fp32 compiling takes as long as about 5 tokens (12 layers of 384
    on an AVX2 processor: 5 to 10 ms a forward, a token 1.5 ms), and afterwards nothing: a query of 15 tokens is not
    made one of 32 (42 ms against 72), a slab of many texts is, which keeps the number of sizes, and so the memory of
    compiled code, small.
    """
    return math.inf if dtype != torch.float32 and onednn_takes_bf16() else 1 / 8


class Slabs:
    """A batch cut into slabs, and the way back to its order.

    Args:
        tokens: the batch.
        budget, padded: see :func:`plan_slabs`.
        fill_price: fill a slab up to a multiple of ``FILL`` tokens with a sequence that nobody reads, where that adds
            at most this share of its tokens and stays within the budget; 0: never. Sequences do not see each other, so
            the one more changes none of them.

    Attributes:
        batches: the slabs, ``padded_length`` each one's longest.
        layouts: where the sequences of each slab lie.
        place: for each sequence of the batch its number among all slabs' sequences.
        places: the same, int64 on the batch's device.
    """

    def __init__(self, tokens: TokenBatch, budget: int, padded: bool = False, fill_price: float = 0.0) -> None:
        slabs = plan_slabs(tokens.lengths, budget, padded)
        if tokens.ids.device.type != "cpu":
            self._send(tokens, slabs)
            return
        ids, lengths = list(tokens.ids.split(tokens.lengths)), list(tokens.lengths)  # type: ignore[no-untyped-call]
        for slab in slabs:
            size = sum(lengths[number] for number in slab)
            missing = -size % FILL
            if missing <= fill_price * size and missing > 0 and (budget == 0 or size + missing <= budget):
                slab.insert(sum(lengths[number] >= missing for number in slab), len(ids))
                ids.append(ids[slab[-1] if slab[-1] < len(ids) else slab[-2]][-1:].expand(missing))
                lengths.append(missing)
        self.batches = [
            TokenBatch(torch.cat([ids[number] for number in slab]), [lengths[number] for number in slab], longest)
            for slab in slabs
            for longest in [lengths[slab[0]]]
        ]
        self.layouts = [Layout(slab.lengths, tokens.ids.device) for slab in self.batches]
        order = [number for slab in slabs for number in slab]
        self.place = sorted(range(len(order)), key=order.__getitem__)[: len(tokens)]
        self.places = torch.tensor(self.place)

    def _send(self, tokens: TokenBatch, slabs: Sequence[Sequence[int]]) -> None:
        """The same without filling up, on a device: every index of the batch goes there in one copy."""
        starts, lengths, device = offsets(tokens.lengths), tokens.lengths, tokens.ids.device
        self.layouts = [Layout([lengths[number] for number in slab], device) for slab in slabs]
        order = [number for slab in slabs for number in slab]
        self.place = sorted(range(len(order)), key=order.__getitem__)
        taken = [token for number in order for token in range(starts[number], starts[number + 1])]
        sent = send([taken, self.place, *(offsets(layout.lengths) for layout in self.layouts)], device)
        self.places = sent[1]
        for layout, ends in zip(self.layouts, sent[2:], strict=True):
            layout.offsets = ends
        ids = tokens.ids.index_select(0, sent[0]).split([layout.tokens for layout in self.layouts])  # type: ignore[no-untyped-call]
        self.batches = [
            TokenBatch(own, layout.lengths, layout.longest) for own, layout in zip(ids, self.layouts, strict=True)
        ]


def each_on_one_thread(
    call: Callable[[TokenBatch, Layout], R], slabs: Sequence[TokenBatch], layouts: Sequence[Layout],
    device: torch.device,
) -> list[R]:  # fmt: skip
    """``call`` of every slab and its layout, in order; on a CPU the threads share out whole slabs.

    A matrix product that several threads share adds up in another order than one thread does, so its last bits depend
    on the number of cores. Here the vectors have the same bits on any number of threads and processes, every slab stays
    in its core's cache, and no core waits for another inside a layer.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not slabs:
        return list(map(call, slabs, layouts))
    try:
        if len(slabs) == 1:  # on one thread too: its bits must not depend on how many there are
            torch.set_num_threads(1)
            return [call(slabs[0], layouts[0])]
        with ThreadPoolExecutor(min(threads, len(slabs)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(call, slabs, layouts))
    finally:
        torch.set_num_threads(threads)  # parts of torch keep this number for the whole process


@dataclass(frozen=True)
class Group:
    """Neighboring sequences of one length.

    Attributes:
        row, token: where the group begins, counted in sequences and in tokens.
        count, length: how many sequences, of how many tokens each.
    """

    row: int
    token: int
    count: int
    length: int


class Layout:
    """Where the sequences of one slab lie.

    Args:
        lengths: tokens of each sequence, in their order; none may be 0.
        device: where the index tensors are made (once, without waiting for the device).

    Attributes:
        groups: neighboring sequences of one length, together all of them.
        longest: the greatest length.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.device = device
        self.groups: list[Group] = []
        row = token = 0
        for length, members in groupby(self.lengths):
            count = len(list(members))
            self.groups.append(Group(row, token, count, length))
            row, token = row + count, token + count * length
        self.tokens = token
        self.longest = max(self.lengths, default=0)

    @cached_property
    def offsets(self) -> Tensor:
        """``[N + 1]`` int64: where each sequence begins, and T at the end; set where they came with the batch."""
        return send([offsets(self.lengths)], self.device)[0]

    @cached_property
    def cumulative(self) -> Tensor:
        """``[N + 1]`` int32: where each sequence begins, and T at the end (what variable-length kernels ask for)."""
        return self.offsets.to(torch.int32)

    @cached_property
    def row_numbers(self) -> Tensor:
        """``[N + 1]`` int32: 0, 1, … N; the layout of one query per sequence."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def starts(self) -> Tensor:
        """``[N]`` int64: the first token of each sequence."""
        return self.offsets[:-1]

    @cached_property
    def sizes(self) -> Tensor:
        """``[N]`` int64: the length of each sequence."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def row_of_token(self) -> Tensor:
        """``[T]`` int64: the sequence that each token belongs to."""
        numbers = torch.arange(len(self.lengths), device=self.device)
        return torch.repeat_interleave(numbers, self.sizes, output_size=self.tokens)

    @cached_property
    def not_first(self) -> Tensor:
        """``[T - N]`` int64: every token but each sequence's first."""
        # The first tokens lie at ends[i], so the j-th other token of sequence i at its own rank plus i + 1.
        others = torch.arange(self.tokens - len(self.lengths), device=self.device)
        numbers = torch.arange(1, len(self.lengths) + 1, device=self.device)
        return others + torch.repeat_interleave(numbers, self.sizes - 1, output_size=len(others))


def row_view(packed: Tensor, first: int, rows: int, length: int, heads: int, part: int, parts: int) -> Tensor:
    """``[B, H, L, d]`` view of one part (query, key or value) of B sequences of L tokens, the first token ``first``.

    ``packed`` is ``[T, parts * H * d]``, the parts side by side.
    """
    block = packed[first : first + rows * length].view(rows, length, parts, heads, -1)
    return block[:, :, part].transpose(1, 2)
