"""Which checkpoint encodes, and how: the flags that every command with an encoder has, in the form the encoder takes.

Imports no torch, so that a command's ``--help`` does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.modeling.options import POOLING_SPELLINGS
from FlagEmbedding.modeling.options import EngineName as EngineName
from FlagEmbedding.modeling.options import FfnPart as FfnPart
from FlagEmbedding.modeling.options import Pooling as Pooling
from FlagEmbedding.utils.cli import choice, internal, option, switch
from FlagEmbedding.utils.errors import UsageError

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
WINDOW = 2_048  # texts that are tokenized, sorted by length and encoded together


@dataclass(frozen=True)
class EncoderArguments:
    """Encoder.

    Fields left at None follow the checkpoint (pooling, experts) or the machine (device, workers).
    """

    encoder: str = option(help="hub id or folder of the checkpoint")
    pooling_method: Pooling | None = choice(
        Pooling, None, "default: what the checkpoint says, else cls", spellings=POOLING_SPELLINGS
    )
    normalize_embeddings: bool = switch(True, "L2-normalize the vectors")
    fp16: bool = switch(False, "half precision: fp16 on a GPU, --dtype auto on a CPU")
    dtype: DtypeName | None = choice(DtypeName, None, "default fp32; auto: bf16 where the hardware has it")
    moe: FfnPart | None = choice(FfnPart, None, "not needed; must agree with the checkpoint")
    engine: EngineName = choice(EngineName, "packed", "padded: transformers' own forward")
    batch_size: int = option(256, "at most this many texts of full length at a time")
    workers: int | None = option(None, "processes that tokenize ahead; 0: a thread. Default: 0, on a GPU up to 8")
    cache_dir: str | None = option(None, "where the hub's files are kept")
    trust_remote_code: bool = switch(False, "run code that comes with the checkpoint")
    truncate_dim: int | None = option(None, "cut dense vectors to this many dimensions (--matryoshka_dims trains that)")
    # What the Python classes set; no flags.
    device: str | None = internal(None)
    heads: bool = internal(False)  # load the sparse and colbert heads
    colbert_dim: int = internal(-1)  # of the colbert head; -1: the hidden size

    def __post_init__(self) -> None:
        if self.fp16 and self.dtype is not None:
            raise UsageError("--fp16 and --dtype say the same thing: give one of them")
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise UsageError(f"--truncate_dim must be at least 1, got {self.truncate_dim}")
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
