"""What ``FlagModel`` and ``BGEM3FlagModel`` share: loading, instructions, windows of texts over one or more devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from FlagEmbedding.inference import keywords
from FlagEmbedding.inference.arguments import WINDOW, DtypeName, EncoderArguments, Pooling
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.inference.texts import PLAIN_FORMAT, check_instruction, whole
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.options import EngineName, FfnPart
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound="Embedder")
Device = str | int | torch.device
Devices = Device | Sequence[Device] | None


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
        query_instruction_format: str = PLAIN_FORMAT,
        devices: Devices = None,
        pooling_method: Pooling | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        *,  # from here on upstream's two classes differ in the order
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        truncate_dim: int | None = None,
        passage_instruction_for_retrieval: str | None = None,
        passage_instruction_format: str = PLAIN_FORMAT,
        colbert_dim: int = -1,
        dtype: DtypeName | None = None,
        engine: EngineName = "packed",
        moe: FfnPart | None = None,
        workers: int = 0,
        device: Device | None = None,
        num_workers: int | None = None,
        **others: Any,
    ) -> None:
        keywords.refuse(others, type(self).__name__, Embedder.__init__)
        if not isinstance(model_name_or_path, str | os.PathLike):
            found = type(model_name_or_path).__name__
            raise UsageError(f"model_name_or_path: expected a hub id or a folder, got {found}: {model_name_or_path!r}")
        self.model_name_or_path = name = os.fspath(model_name_or_path)
        self._place = os.path.abspath(name) if os.path.isdir(name) else name  # copies may wake in another folder
        self.normalize_embeddings = normalize_embeddings
        self.batch_size = whole("batch_size", batch_size)
        self.query_max_length = whole("query_max_length", query_max_length)
        self.passage_max_length = whole("passage_max_length", passage_max_length)
        refuse_both("devices", devices, "device", device)
        refuse_both("workers", workers or None, "num_workers", num_workers)
        self.target_devices = target_devices(devices if device is None else device)
        workers = whole("workers", workers if num_workers is None else num_workers, 0)
        self.query_instruction_format = own_format("query", query_instruction_for_retrieval, query_instruction_format)
        self.passage_instruction_format = own_format(
            "passage", passage_instruction_for_retrieval, passage_instruction_format
        )
        self._encoders = [
            TextEncoder(
                EncoderArguments(
                    encoder=model_name_or_path,
                    pooling_method=pooling_method,
                    normalize_embeddings=normalize_embeddings,
                    dtype=dtype or upstream_dtype(use_fp16, use_bf16, name),
                    device=name,
                    engine=engine,
                    moe=moe,
                    heads=self._heads,
                    colbert_dim=colbert_dim,
                    workers=workers,
                    cache_dir=cache_dir,
                    trust_remote_code=trust_remote_code,
                )
            )
            for name in self.target_devices
        ]
        first = self._expose()
        self.pooling_method: str = first.pooling
        self.truncate_dim = None if truncate_dim is None else whole("truncate_dim", truncate_dim, 1, first.hidden_size)
        self.query_instruction_for_retrieval = first.instruction("query", query_instruction_for_retrieval)
        self.passage_instruction_for_retrieval = first.instruction("passage", passage_instruction_for_retrieval)

    def _expose(self) -> TextEncoder:
        """Upstream's attributes, of the encoder on the first device, which is returned."""
        first = self._encoders[0]
        self.tokenizer: Any = first.tokenizer
        self.model: torch.nn.Module = first.encoder
        self._as_loaded = _versions(self.model)
        return first

    def __getstate__(self) -> dict[str, Any]:
        """Options alone: a copy, or what a pickle becomes, loads the checkpoint where it wakes, with the same bits."""
        if self._as_loaded != _versions(self.model):
            logger.warning("%s: weights were changed since; a copy has the checkpoint's", self.model_name_or_path)
        loaded = ("_encoders", "tokenizer", "model", "_as_loaded")
        state = {name: value for name, value in vars(self).items() if name not in loaded}
        return {**state, "_options": [replace(each.options, encoder=self._place) for each in self._encoders]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load what :meth:`__getstate__` names."""
        options = state.pop("_options")
        vars(self).update(state)
        self._encoders = [TextEncoder(each) for each in options]
        self._expose()

    @property
    def _width(self) -> int:
        return self.truncate_dim or self._encoders[0].hidden_size

    def stop_self_pool(self) -> None:
        """Stop the processes that tokenize ahead and let go of cached memory; the model can still be used."""
        for encoder in self._encoders:
            encoder.pool.close()
        torch.cuda.empty_cache()

    def __enter__(self: E) -> E:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_self_pool()

    def _run(
        self,
        texts: Sequence[str],
        max_length: int | None,
        batch_size: int | None,
        want: Collection[Kind],
        collect: Callable[[Representations], T],
        show_progress_bar: bool | None = None,
    ) -> list[T]:
        """``collect`` of each window's representations, in order; windows are shared out over the devices."""
        windows = [texts[i : i + WINDOW] for i in range(0, len(texts), WINDOW)]
        share = len(self._encoders)
        size = self.batch_size if batch_size is None else whole("batch_size", batch_size)
        asked = self.passage_max_length if max_length is None else whole("max_length", max_length)
        longest = self._encoders[0].max_length(asked)

        def encode(number: int) -> Iterator[tuple[int, T]]:
            mine = ((windows[i], i) for i in range(number, len(windows), share))
            for representations, i in self._encoders[number].encode(mine, longest, want, size):
                yield i, collect(representations)
                bar.update(len(windows[i]))

        with tqdm(total=len(texts), unit="texts", disable=not show_progress_bar) as bar:
            if share == 1:
                return [found for _, found in encode(0)]
            with ThreadPoolExecutor(share) as pool:
                parts = pool.map(lambda number: list(encode(number)), range(share))
                pairs = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
                return [found for _, found in pairs]

    def _dense(self, representations: Representations) -> torch.Tensor:
        """``[N, D]`` float32, cut to ``truncate_dim`` and then normalized again."""
        assert representations.dense is not None
        vectors = representations.dense.float()[:, : self._width]
        shorter = self.truncate_dim is not None and self.normalize_embeddings
        return torch.nn.functional.normalize(vectors, dim=-1) if shorter else vectors


def _versions(model: torch.nn.Module) -> list[tuple[int, int]]:
    return [(each.data_ptr(), each._version) for each in model.parameters()]


def own_format(role: str, instruction: str | None, form: str) -> str:
    """The format of an instruction given beside it; the checkpoint's own instruction stands as it is."""
    name = f"{role}_instruction_for_retrieval"
    check_instruction(instruction, form, name)
    if instruction is None and form != PLAIN_FORMAT:
        logger.warning("the format of %s has no effect: it goes with an instruction given beside it", name)
    return PLAIN_FORMAT if instruction is None else form


def refuse_both(name: str, value: object, other_name: str, other: object) -> None:
    """Raise ``UsageError`` where two keywords for the same thing are given."""
    if value is not None and other is not None:
        raise UsageError(f"{name} and {other_name} say the same thing: give one of them")


def target_devices(devices: Devices) -> list[str]:
    """Names of the devices to use; None: every GPU, or the CPU."""
    if devices is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    listed = [devices] if isinstance(devices, str | int | torch.device) else list(devices)
    if not listed:
        raise UsageError("devices: an empty list; give None, a name such as 'cuda:0' or 'cpu', or a list of names")
    return [f"cuda:{device}" if isinstance(device, int) else str(device) for device in listed]


def upstream_dtype(use_fp16: bool | None, use_bf16: bool, device: str) -> DtypeName:
    """What upstream's two switches mean on a device: fp16 is for GPUs, and the default there."""
    if use_bf16:
        return "bf16"
    return "fp32" if use_fp16 is False or not device.startswith("cuda") else "fp16"
