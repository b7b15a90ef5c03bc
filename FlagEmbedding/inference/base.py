"""What ``FlagModel`` and ``BGEM3FlagModel`` share: loading, instructions, windows of texts over one or more devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from FlagEmbedding.inference.arguments import WINDOW, DtypeName, EncoderArguments, Pooling
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.options import EngineName, FfnPart
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.texts import as_texts

T = TypeVar("T")
Texts = str | Sequence[str]
Devices = str | int | list[str] | list[int] | None


class Embedder:
    """A checkpoint on its devices; arguments as upstream's, see ``embedder.py`` for the differences."""

    _heads = False

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool | None = None,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "{}{}",
        devices: Devices = None,
        pooling_method: Pooling | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        truncate_dim: int | None = None,
        passage_instruction_for_retrieval: str | None = None,
        passage_instruction_format: str = "{}{}",
        *,
        colbert_dim: int = -1,
        dtype: DtypeName | None = None,
        engine: EngineName = "packed",
        moe: FfnPart | None = None,
        workers: int = 0,
    ) -> None:
        self.model_name_or_path = model_name_or_path
        self.normalize_embeddings = normalize_embeddings
        self.batch_size = batch_size
        self.query_max_length = query_max_length
        self.passage_max_length = passage_max_length
        self.truncate_dim = truncate_dim
        self.target_devices = target_devices(devices)
        self._encoders = [
            TextEncoder(
                EncoderArguments(
                    encoder=model_name_or_path,
                    pooling_method=pooling_method,
                    normalize_embeddings=normalize_embeddings,
                    dtype=dtype or upstream_dtype(use_fp16, use_bf16, device),
                    device=device,
                    engine=engine,
                    moe=moe,
                    heads=self._heads,
                    colbert_dim=colbert_dim,
                    workers=workers,
                    cache_dir=cache_dir,
                    trust_remote_code=trust_remote_code,
                )
            )
            for device in self.target_devices
        ]
        first = self._encoders[0]
        self.tokenizer: Any = first.tokenizer
        self.model: torch.nn.Module = first.encoder  # on the first device
        self.pooling_method: str = first.pooling
        self.query_instruction_for_retrieval = first.instruction("query", query_instruction_for_retrieval)
        self.passage_instruction_for_retrieval = first.instruction("passage", passage_instruction_for_retrieval)
        # A format goes with the instruction given beside it; the checkpoint's own stands as it is.
        plain = "{}{}"
        self.query_instruction_format = plain if query_instruction_for_retrieval is None else query_instruction_format
        self.passage_instruction_format = (
            plain if passage_instruction_for_retrieval is None else passage_instruction_format
        )

    @property
    def _width(self) -> int:
        width = self._encoders[0].hidden_size
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    def _run(
        self,
        texts: Sequence[str],
        max_length: int | None,
        batch_size: int | None,
        want: Collection[Kind],
        collect: Callable[[Representations], T],
    ) -> list[T]:
        """``collect`` of each window's representations, in order; windows are shared out over the devices."""
        windows = [texts[i : i + WINDOW] for i in range(0, len(texts), WINDOW)]
        share = len(self._encoders)

        def encode(number: int) -> Iterator[tuple[int, T]]:
            encoder = self._encoders[number]
            mine = ((windows[i], i) for i in range(number, len(windows), share))
            longest = encoder.max_length(max_length or self.passage_max_length)
            found = encoder.encode(mine, longest, want, batch_size or self.batch_size)
            return ((i, collect(representations)) for representations, i in found)

        if share == 1:
            return [found for _, found in encode(0)]
        with ThreadPoolExecutor(share) as pool:
            parts = pool.map(lambda number: list(encode(number)), range(share))
            return [found for _, found in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]

    def _dense(self, representations: Representations) -> torch.Tensor:
        """``[N, D]`` float32, cut to ``truncate_dim`` and then normalized again."""
        assert representations.dense is not None
        vectors = representations.dense.float()[:, : self._width]
        shorter = self.truncate_dim is not None and self.normalize_embeddings
        return torch.nn.functional.normalize(vectors, dim=-1) if shorter else vectors


def as_list(texts: Texts, instruction: str | None, instruction_format: str | None) -> tuple[list[str], bool]:
    """The texts after the instruction, and whether a single one was given."""
    listed = as_texts(texts)
    if instruction is not None:
        # A format typed on a command line holds a backslash and an n, not a line end.
        form = (instruction_format or "{}{}").replace("\\n", "\n")
        listed = [form.format(instruction, text) for text in listed]
    return listed, isinstance(texts, str)


def target_devices(devices: Devices) -> list[str]:
    """Names of the devices to use; None: every GPU, or the CPU."""
    if devices is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    listed: Sequence[str | int] = [devices] if isinstance(devices, str | int) else devices
    if not listed:
        raise UsageError("devices: an empty list; give None, a name such as 'cuda:0' or 'cpu', or a list of names")
    return [f"cuda:{device}" if isinstance(device, int) else device for device in listed]


def upstream_dtype(use_fp16: bool | None, use_bf16: bool, device: str) -> DtypeName:
    """What upstream's two switches mean on a device: fp16 is for GPUs, and the default there."""
    if use_bf16:
        return "bf16"
    return "fp32" if use_fp16 is False or not device.startswith("cuda") else "fp16"
