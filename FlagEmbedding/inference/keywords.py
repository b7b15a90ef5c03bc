"""Keywords of upstream and of sentence-transformers: taken under their own name, or refused with what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from FlagEmbedding.utils.errors import UsageError

_WHEN_MADE = "give it when the model is made"
_ADVICE = {
    "device": "devices= is given when the model is made",
    "num_workers": "workers= is given when the model is made",
    "use_fp16": _WHEN_MADE,
    "normalize_embeddings": _WHEN_MADE,
    "pooling_method": _WHEN_MADE,
    "truncate_dim": _WHEN_MADE,
    "convert_to_tensor": "give convert_to_numpy=False",
    "convert_to_numpy": "vectors are numpy arrays here; torch.from_numpy makes tensors of them",
    "show_progress_bar": "give it to encode, encode_queries or encode_corpus",
    "prompt": "give instruction=",
    "prompt_name": "give instruction=",
    "torch_dtype": "give dtype='fp32', 'fp16', 'bf16' or 'auto'",
    "model_kwargs": "give dtype=, devices= or trust_remote_code=",
    "cache_folder": "give cache_dir=",
    "token": "log in by `hf auth login`",
    "revision": "fetch it by `hf download --revision` and give the folder",
}


def refuse_instruction(others: Mapping[str, Any], verb: str) -> None:
    """Raise ``UsageError`` where an instruction is given to a verb that has its own."""
    for name in ("instruction", "instruction_format"):
        if name in others:
            raise UsageError(f"{verb}: takes no keyword {name}; give it when the model is made, or call encode")


def refuse(others: Mapping[str, Any], where: str, call: Callable[..., Any]) -> None:
    """Raise ``UsageError`` for the first of ``others``, keywords that ``call`` does not take."""
    for name in others:
        parameters = inspect.signature(call).parameters.values()
        known = [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        advice = _ADVICE.get(name, f"it takes {', '.join(known)}")
        raise UsageError(f"{where}: takes no keyword {name}; {advice}")
