"""What this machine's processor and devices can do: asked in this one place, by training and encoding alike.

Everything is asked of the library that will compute, not of the processor's flags, so that the switches by which a
machine stands in for a lesser one (``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2``) hold here too.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from FlagEmbedding.utils.distributed import local_rank

NO_CPU_BF16 = "this processor has no bf16 instructions: the numbers are bf16's, the speed is less than fp32's"


@functools.cache
def onednn_takes_bf16() -> bool:
    """Whether oneDNN's products take bfloat16 on this processor; where it does not, calling them raises."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and asked is not None and asked())


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether bfloat16 products are faster than float32 ones: AVX512-BF16 or AMX, or Arm's bf16 instructions.

    oneDNN takes bfloat16 on any AVX-512 processor, and computes it more slowly than float32 where these are missing.
    """
    if not onednn_takes_bf16():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def cpu_instruction_sets() -> tuple[str, ...]:
    """Sets of vector instructions for which code may run, best first: of ``avx512``, ``avx2`` (with FMA) and ``neon``.

    The processor has them, and torch was not told to do with less (``ATEN_CPU_CAPABILITY``).
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ("neon",)
    told = torch.backends.cpu.get_cpu_capability()
    has = {"avx512": torch.cpu._is_avx512_supported(), "avx2": torch.cpu._is_avx2_supported()}
    allowed = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(told, ())
    return tuple(name for name in allowed if has[name])


@functools.cache
def cpu_has_amx() -> bool:
    """Whether the processor multiplies bfloat16 tiles and the system lets this process use them."""
    return cpu_has_bf16() and bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def choose_device() -> torch.device:
    """The GPU of this process (LOCAL_RANK under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def tokens_that_fit(device: torch.device, bytes_per_token: int, most: int, fewest: int) -> int:
    """How many tokens may be computed at a time on ``device`` in half of its free memory, in [fewest, most].

    Only NVIDIA GPUs say how much is free; ``fewest`` for other devices.
    """
    if device.type != "cuda":
        return fewest
    free, _ = torch.cuda.mem_get_info(device)
    return max(fewest, min(most, free // 2 // bytes_per_token))


def send(numbers: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Lists of numbers as int64 tensors on ``device``: one page-locked buffer, one copy that nothing waits for."""
    flat = torch.tensor([number for part in numbers for number in part], dtype=torch.int64)
    if device.type == "cuda":
        flat = flat.pin_memory()
    return list(flat.to(device, non_blocking=True).split([len(part) for part in numbers]))  # type: ignore[no-untyped-call]


def tokenizer_workers(device_type: str) -> int:
    """Processes that tokenize ahead: a thread (0) keeps up with a CPU; a GPU wants the process's share of the cores."""
    if device_type != "cuda":
        return 0
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, share - 1))
