"""A checkpoint for mteb, by its path and under a name of its own.

mteb calls every local folder ``no_model_name/available`` and files results by name and revision, so that a second
folder is given the first one's scores. Here the name is the folder's and the revision its contents'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import model_fingerprint


def mteb_model(checkpoint: str, name: str | None = None, **settings: Any) -> Any:
    """What ``mteb.evaluate(model, tasks)`` takes: vectors, pooling and instructions as the folder says.

    Args:
        checkpoint: folder or hub id.
        name: under which results are filed, ``owner/name``; default: ``local/`` and the folder's.
        settings: of ``SentenceTransformer``, such as ``device``.

    Raises:
        UsageError: mteb is not installed; a name without owner.
    """
    try:
        from mteb.models import SentenceTransformerEncoderWrapper
    except ImportError as error:
        raise UsageError(f"mteb cannot be imported ({error}): pip install 'FlagEmbedding[interop]'") from error
    folder = Path(resolve_folder(checkpoint)).resolve()
    name = name or f"local/{folder.name}"
    if name.count("/") != 1 or "" in name.split("/"):
        raise UsageError(f"name {name!r}: expected owner/name, such as local/{folder.name}")
    model = SentenceTransformerEncoderWrapper(str(folder), trust_remote_code=True, **settings)
    said = {"name": name, "revision": model_fingerprint(folder)[:40]}
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update=said)
    return model
