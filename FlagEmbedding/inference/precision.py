"""Which numbers to compute in, and where: ``--dtype auto|fp32|bf16|fp16`` and the device, resolved once."""

from __future__ import annotations

import os
from typing import Literal

import torch

from FlagEmbedding.utils.distributed import local_rank
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_bf16() -> bool:
    """True where the processor multiplies bf16 matrices itself (avx512_bf16, AMX, or Arm's bf16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                key, _, flags = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
    except OSError:
        pass
    return False


def choose_device() -> torch.device:
    """The GPU of this process (LOCAL_RANK under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that ``name`` means on ``device``; 'auto' takes bf16 where the hardware has it and says so."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype {name}: choose from auto {' '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        dtype, reason = (
            (torch.bfloat16, "the GPU has it") if torch.cuda.is_bf16_supported() else (torch.float16, "no bf16 there")
        )
    elif cpu_has_bf16():
        dtype, reason = torch.bfloat16, "the processor has bf16 matrix instructions"
    else:
        dtype, reason = torch.float32, "the processor has no bf16 matrix instructions"
    logger.info("dtype auto: %s (%s)", dtype_name(dtype), reason)
    return dtype


def half_precision(device: torch.device) -> str:
    """What ``--fp16`` means here: fp16 on a GPU; a CPU computes fp16 slowly, so 'auto' there, in one line."""
    if device.type == "cuda":
        return "fp16"
    logger.warning("--fp16: this processor has no fast fp16; going on with --dtype auto instead")
    return "auto"


def tokenizer_workers(device_type: str) -> int:
    """Processes that tokenise ahead: a thread (0) keeps up with a CPU; a GPU wants the process's share of the cores."""
    if device_type != "cuda":
        return 0
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, share - 1))


def dtype_name(dtype: torch.dtype) -> str:
    """'fp32', 'bf16' or 'fp16'."""
    return next(name for name, known in DTYPES.items() if known == dtype)
