"""``FlagAutoModel`` and ``FlagAutoReranker``: upstream's way to a model whose class is not known.

Upstream looks names up in a table; here the folder decides: with sparse and colbert heads it is BGE-M3's class. Pooling
comes from the folder too, and ``trust_remote_code`` has to be given.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from FlagEmbedding.inference.base import Devices
from FlagEmbedding.inference.embedder import BGEM3FlagModel, FlagModel
from FlagEmbedding.inference.reranker import FlagReranker
from FlagEmbedding.inference.texts import PLAIN_FORMAT
from FlagEmbedding.modeling.heads import HEAD_FILES
from FlagEmbedding.modeling.options import Pooling
from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder

C = TypeVar("C")

_EMBEDDERS: dict[str, type[FlagModel] | type[BGEM3FlagModel]] = {
    "encoder-only-base": FlagModel,
    "encoder-only-m3": BGEM3FlagModel,
}
_RERANKERS: dict[str, type[FlagReranker]] = {"encoder-only-base": FlagReranker}
# The one encoder of upstream's table with a format of its own, by its name as there.
_FORMATS = {"multilingual-e5-large-instruct": "Instruct: {}\nQuery: {}"}


class FlagAutoModel:
    """Use :meth:`from_finetuned`."""

    def __init__(self) -> None:
        raise UsageError("FlagAutoModel is no model: FlagAutoModel.from_finetuned(model_name_or_path) makes one")

    @classmethod
    def from_finetuned(
        cls,
        model_name_or_path: str,
        model_class: str | Enum | None = None,
        normalize_embeddings: bool = True,
        use_fp16: bool | None = None,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        devices: Devices = None,
        pooling_method: Pooling | None = None,
        trust_remote_code: bool | None = None,
        query_instruction_format: str | None = None,
        truncate_dim: int | None = None,
        **keywords: Any,
    ) -> FlagModel | BGEM3FlagModel:
        """A ``BGEM3FlagModel`` where the folder has sparse and colbert heads, else a ``FlagModel``.

        Args:
            model_name_or_path: hub id or folder.
            model_class: 'encoder-only-base' or 'encoder-only-m3', to choose oneself.
            keywords: of the class that is chosen; the named ones are as there.

        Raises:
            UsageError: a class that this package does not have, or a keyword that the class does not take.
        """
        if model_class is None:
            folder = resolve_folder(model_name_or_path, cache_dir=keywords.get("cache_dir"))
            folder = files_of(folder, *HEAD_FILES.values(), "modules.json")
            has_heads = any((folder / name).is_file() for name in HEAD_FILES.values())
            model_class = "encoder-only-m3" if has_heads else "encoder-only-base"
        path = Path(model_name_or_path)
        name = path.parent.name if path.name.startswith("checkpoint-") else path.name
        own_format = PLAIN_FORMAT if query_instruction_for_retrieval is None else _FORMATS.get(name, PLAIN_FORMAT)
        kind = _chosen(model_class, _EMBEDDERS)
        return kind(
            model_name_or_path,
            normalize_embeddings=normalize_embeddings,
            use_fp16=use_fp16,
            use_bf16=use_bf16,
            query_instruction_for_retrieval=query_instruction_for_retrieval,
            query_instruction_format=own_format if query_instruction_format is None else query_instruction_format,
            devices=devices,
            pooling_method=pooling_method,
            trust_remote_code=bool(trust_remote_code),
            truncate_dim=truncate_dim,
            **keywords,
        )


class FlagAutoReranker:
    """Use :meth:`from_finetuned`."""

    def __init__(self) -> None:
        raise UsageError("FlagAutoReranker is no model: FlagAutoReranker.from_finetuned(model_name_or_path) makes one")

    @classmethod
    def from_finetuned(
        cls,
        model_name_or_path: str,
        model_class: str | Enum | None = None,
        use_fp16: bool = False,
        trust_remote_code: bool | None = None,
        **keywords: Any,
    ) -> FlagReranker:
        """A ``FlagReranker``, the one kind of reranker here; keywords as there. Raises ``UsageError``."""
        kind = _chosen("encoder-only-base" if model_class is None else model_class, _RERANKERS)
        return kind(model_name_or_path, use_fp16=use_fp16, trust_remote_code=bool(trust_remote_code), **keywords)


def _chosen(model_class: str | Enum, classes: dict[str, C]) -> C:
    wanted = model_class.value if isinstance(model_class, Enum) else model_class
    if wanted not in classes:
        raise UsageError(
            f"model_class {wanted!r}: expected {' or '.join(map(repr, classes))}; models of other kinds need "
            "upstream's FlagEmbedding, in an environment of its own"
        )
    return classes[wanted]
