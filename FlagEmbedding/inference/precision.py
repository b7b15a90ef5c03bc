"""Which numbers to compute in, and where: ``--dtype auto|fp32|bf16|fp16`` and the device, resolved once."""

from __future__ import annotations

import torch

from FlagEmbedding.inference.arguments import DtypeName
from FlagEmbedding.modeling.files import first_line
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import NO_CPU_BF16, choose_device, cpu_has_bf16
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; None: the GPU of this process, else the CPU. Raises ``UsageError``."""
    if name is None:
        return choose_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: no such kind; give 'cpu', 'cuda:0' or the number of a GPU") from error
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        raise UsageError(f"device {name!r}: torch sees {there} GPU(s) here; give another number, or 'cpu'")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"device {name!r}: torch cannot use it here ({first_line(error)}); give 'cpu'") from error
    return device


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype that ``name`` means on ``device``; 'auto' takes bf16 where the hardware has it and says so."""
    if name == "auto":
        if device.type == "cuda":
            name, reason = ("bf16", "the GPU has it") if torch.cuda.is_bf16_supported() else ("fp16", "no bf16 there")
        else:
            name, has = ("bf16", "has") if cpu_has_bf16() else ("fp32", "has no")
            reason = f"the processor {has} bf16 matrix instructions"
        logger.info("dtype auto: %s (%s)", name, reason)
    elif name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        logger.warning("bf16: %s", NO_CPU_BF16)
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: choose from auto {' '.join(DTYPES)}")
    return DTYPES[name]


def half_precision(device: torch.device) -> DtypeName:
    """What ``--fp16`` means here: fp16 on a GPU; a CPU computes fp16 slowly, so 'auto' there, in one line."""
    if device.type == "cuda":
        return "fp16"
    logger.warning("--fp16: this processor has no fast fp16; going on with --dtype auto instead")
    return "auto"


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """'fp32', 'bf16' or 'fp16'."""
    return next(name for name, known in DTYPES.items() if known == dtype)
