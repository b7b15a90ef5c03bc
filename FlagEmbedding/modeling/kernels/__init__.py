"""Kernels in C++ for what torch has no fast CPU operator for: attention over rows without padding, and what stands
between an encoder's matrix products (GELU, dropout with residual and LayerNorm).

``pip install`` compiles them (``setup.py``: optional extensions of plain C functions, no Python and no torch inside),
a library for each instruction set: ``avx512`` (with AMX for attention in bfloat16 where there is AMX), ``avx2`` (with
FMA) and ``neon``. The best one that the processor has and torch may use is called, or the one that
``FLAGEMBEDDING_KERNELS`` names. Where there is none, and with ``FLAGEMBEDDING_KERNELS=0``, ``available`` says no and
callers go by torch's own operators, more slowly: the same numbers up to rounding, but for what dropout draws.

Calls release the interpreter, so threads compute side by side; a call itself uses one thread unless it says otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import cpu_has_amx, cpu_instruction_sets
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
LINE = 1024  # elements that go together where a tensor is shared out
DROPOUT_LEVELS = 1 << 16  # dropout compares 16 random bits with a threshold


def available(tensor: Tensor) -> bool:
    """Whether the kernels take tensors like this one: on the CPU, float32 or bfloat16.

    Where there are kernels, all of them are used. Times of torch's operators over theirs with ``avx2`` (EPYC of 2017,
    one thread, float32): fused attention forward 2.0 at rows of 15 tokens, 1.3 at 117, 1.1 to 1.2 at 256 and 512;
    forward and backward 1.3, with dropout 1.9 to 2.6; GELU 1.2; residual and norm 1.2, with dropout 2.0.
    """
    return tensor.device.type == "cpu" and tensor.dtype in SUFFIXES and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels that this process calls; None where there are none or they are switched off.

    Raises:
        UsageError: ``FLAGEMBEDDING_KERNELS`` names a set that is not known, not the processor's, or not compiled.
    """
    asked = os.environ.get("FLAGEMBEDDING_KERNELS", "").lower()
    if asked in ("0", "n", "no", "false", "off"):
        return None
    known = cpu_instruction_sets()
    if asked in ("", "1", "y", "yes", "true", "on"):
        return next((found for name in known if (found := load(name)) is not None), None)
    choice = " or ".join(["0", *known])
    if asked not in known:
        raise UsageError(f"FLAGEMBEDDING_KERNELS={asked}: on this processor, as torch uses it, it can be {choice}")
    found = load(asked)
    if found is None:
        raise UsageError(f"FLAGEMBEDDING_KERNELS={asked}: not compiled; install again with a newer C++ compiler")
    return found


def load(instruction_set: str) -> ctypes.CDLL | None:
    """The kernels of one instruction set, which the processor must have; None where they were not compiled."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels_{instruction_set}{suffix}")
        if path.is_file():
            return _open(path)
    return None


def _open(path: Path) -> ctypes.CDLL | None:
    """The library, if it was compiled for this machine and from the sources beside it."""
    try:
        found = ctypes.CDLL(str(path))
        found.kernel_sources.restype = ctypes.c_char_p
        compiled = found.kernel_sources().decode()
    except (OSError, AttributeError):
        compiled = ""
    files = sorted(file for file in path.parent.iterdir() if file.suffix in (".cpp", ".h"))
    if compiled != hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]:
        logger.warning("%s was compiled from other sources or for another machine: install again to use it", path.name)
        return None
    return found


def dropout_threshold(probability: float) -> tuple[int, float]:
    """What 16 random bits must reach to be kept, and what kept values are multiplied by.

    The probability is rounded to a multiple of 2^-16 (0.1 becomes 0.100006); the scale is that of the rounded one, so
    the expectation is exact.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout probability must be in [0, 1), got {probability}")
    threshold = min(round(probability * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    return threshold, DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold)


def keep_mask(seed: int, stream: int, threshold: int, count: int) -> Tensor:
    """The mask that the kernels draw for one stream (a row of what is masked), ``[count]`` uint8: 1 keep, 0 drop."""
    mask = torch.empty(count, dtype=torch.uint8)
    _function("keep_mask")(
        ctypes.c_uint64(seed),
        ctypes.c_uint64(stream),
        ctypes.c_uint32(threshold),
        ctypes.c_int64(count),
        ctypes.c_void_p(mask.data_ptr()),
    )
    return mask


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of ``kernels.cpp``: the same fields in the same order.

    Strides are elements from one token to the next. The query stride is also that of ``d_query``, the key stride that
    of ``value``, ``d_key`` and ``d_value``. Starts are int32 ``[rows + 1]``; ``log_sums`` float32 ``[tokens, heads]``.
    """

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("key_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("key_starts", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("last", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("dropout_scale", ctypes.c_float),
        ("dropout_threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("log_sums", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("gradient_stride", ctypes.c_int64),
        ("d_query", ctypes.c_void_p),
        ("d_key", ctypes.c_void_p),
        ("d_value", ctypes.c_void_p),
    )


class AddNormCall(ctypes.Structure):
    """``AddNormCall`` of ``kernels.cpp``: the same fields in the same order.

    ``sums``, ``means`` and ``inverses`` (these two float32 ``[T]``) are what a backward reads, null where none follows.
    """

    _fields_ = (
        ("y", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("inverses", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("dropout_scale", ctypes.c_float),
        ("dropout_threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("d_out", ctypes.c_void_p),
        ("d_y", ctypes.c_void_p),
        ("d_residual", ctypes.c_void_p),
    )


class EncoderLinear(ctypes.Structure):
    """``Linear`` of ``products.h``."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class EncoderNorm(ctypes.Structure):
    """``Norm`` of ``encoder.h``."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_double))


class EncoderLayer(ctypes.Structure):
    """``Layer`` of ``encoder.h``."""

    _fields_ = (
        *((name, EncoderLinear) for name in ("query", "key", "value", "output")),
        ("attention_norm", EncoderNorm),
        ("wide", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("wide_experts", ctypes.c_int64),
        ("narrow_experts", ctypes.c_int64),
        ("gate", ctypes.c_void_p),
        ("output_norm", EncoderNorm),
    )


class Encoder(ctypes.Structure):
    """``Encoder`` of ``encoder.h``."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("type", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("padding", ctypes.c_int64),
        ("norm", EncoderNorm),
        ("layers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
    )


def vector_lanes() -> int:
    """Numbers of float32 in a vector: 16 with AVX-512, 8 with AVX2, 4 with NEON."""
    return int(_function("vector_lanes", ctypes.c_int64)())


def lay_out(weight: Tensor) -> Tensor:
    """A linear layer's weight ``[M, K]``, float32 and contiguous, in the panels that the products read."""
    outputs, inputs = map(ctypes.c_int64, weight.shape)
    panels = torch.empty(_function("panel_size", ctypes.c_int64)(inputs, outputs), dtype=torch.float32)
    _function("panels_f32")(ctypes.c_void_p(weight.data_ptr()), inputs, outputs, ctypes.c_void_p(panels.data_ptr()))
    return panels


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, contiguous and float32, by the encoder's product."""
    panels, y = lay_out(weight), x.new_empty(len(x), len(weight))
    linear = EncoderLinear(panels.data_ptr(), None if bias is None else bias.data_ptr(), *reversed(weight.shape))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)]
    _function("product_f32")(ctypes.byref(linear), pointers[0], ctypes.c_int64(len(x)), pointers[1])
    return y


def encode(encoder: Encoder, ids: Tensor, starts: Tensor, first_only: bool, output: Tensor) -> int:
    """Write last hidden states into ``output``; gives -1, or the number of a token that the tables do not hold."""
    found: int = _function("encode_f32", ctypes.c_int64)(
        ctypes.byref(encoder),
        ctypes.c_void_p(ids.data_ptr()),
        ctypes.c_void_p(starts.data_ptr()),
        ctypes.c_int64(len(starts) - 1),
        ctypes.c_int32(first_only),
        ctypes.c_void_p(output.data_ptr()),
    )
    return found


def attention(direction: str, dtype: torch.dtype, call: AttentionCall, lengths: Sequence[int]) -> None:
    """Run ``call`` for all rows, shared out among torch's threads.

    Args:
        direction: ``forward`` or ``backward``.
        dtype: of queries, keys, values, output and their gradients.
        call: everything but ``first`` and ``last``.
        lengths: tokens of each row, by which the rows are shared out.
    """
    name = f"attention_{direction}_{SUFFIXES[dtype]}"
    tiles = dtype == torch.bfloat16 and call.width % 32 == 0 and cpu_has_amx() and hasattr(library(), f"{name}_amx")
    function = _function(f"{name}_amx" if tiles else name)

    def run(share: tuple[int, int]) -> None:
        own = AttentionCall.from_buffer_copy(call)
        own.first, own.last = share
        function(ctypes.byref(own))

    _share_out(run, _shares([length * length for length in lengths], torch.get_num_threads()))


def gelu(x: Tensor, d_y: Tensor | None = None) -> Tensor:
    """``x * Phi(x)`` of a contiguous tensor, exact to 1e-7; with ``d_y`` the gradient of ``x`` instead."""
    result = torch.empty_like(x)
    tensors = (x, result) if d_y is None else (x, d_y, result)
    direction = "forward" if d_y is None else "backward"
    function = _function(f"gelu_{direction}_{SUFFIXES[x.dtype]}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]

    def run(share: tuple[int, int]) -> None:
        function(*pointers, ctypes.c_int64(share[0] * LINE), ctypes.c_int64(min(share[1] * LINE, x.numel())))

    _share_out(run, _even_shares(-(-x.numel() // LINE)))
    return result


def add_norm_forward(y: torch.dtype, residual: torch.dtype, call: AddNormCall, rows: int) -> None:
    """Run ``call`` for all rows, shared out among torch's threads; the dtypes of ``y`` and of everything else."""
    function = _function(f"add_norm_forward_{SUFFIXES[y]}_{SUFFIXES[residual]}")
    _share_out(lambda share: function(ctypes.byref(call), *map(ctypes.c_int64, share)), _even_shares(rows))


def add_norm_backward(y: torch.dtype, residual: torch.dtype, call: AddNormCall, rows: int) -> tuple[Tensor, Tensor]:
    """The backward of :func:`add_norm_forward`; gives the gradients of weight and bias, float32 ``[D]``."""
    function = _function(f"add_norm_backward_{SUFFIXES[y]}_{SUFFIXES[residual]}")
    shares = _even_shares(rows)
    sums = torch.zeros(len(shares), 2, call.width, dtype=torch.float32)

    def run(share: tuple[int, int]) -> None:
        own = sums[shares.index(share)]
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in own]
        function(ctypes.byref(call), *pointers, *map(ctypes.c_int64, share))

    _share_out(run, shares)
    d_weight, d_bias = sums.sum(0).unbind(0)
    return d_weight, d_bias


def _function(name: str, result: Any = None) -> Callable[..., Any]:
    found = library()
    if found is None:
        raise RuntimeError("the compiled kernels are not available here: ask `available` first")
    function = getattr(found, name)
    function.restype = result
    typed: Callable[..., Any] = function
    return typed


def _shares(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Neighbouring items ``[first, last)`` in at most ``parts`` shares of about the same cost."""
    if parts <= 1 or len(costs) <= 1:
        return [(0, len(costs))]
    shares: list[tuple[int, int]] = []
    first, spent, total = 0, 0, sum(costs)
    for place, cost in enumerate(costs, start=1):
        spent += cost
        if spent * parts >= total * (len(shares) + 1) or place == len(costs):
            shares.append((first, place))
            first = place
    return shares


def _even_shares(count: int) -> list[tuple[int, int]]:
    """``count`` items of one cost in as many shares as torch has threads."""
    parts = max(1, min(torch.get_num_threads(), count))
    ends = [count * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _share_out(run: Callable[[tuple[int, int]], None], shares: list[tuple[int, int]]) -> None:
    """Run every share, the first one here and the others on threads of their own."""
    if len(shares) == 1:
        run(shares[0])
        return
    others = [_threads().submit(run, share) for share in shares[1:]]
    run(shares[0])
    for other in others:
        other.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernels")
