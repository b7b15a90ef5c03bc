"""From a corpus and an encoder to an index folder: for step 0, for mining, and for negatives refreshed in training.

For schedulers of one's own (docs/cluster.md), loaded on first use::

    from FlagEmbedding.indexing import encode_shard, finish, merge, plan
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Plan": "FlagEmbedding.indexing.planning",
    "plan": "FlagEmbedding.indexing.planning",
    "encode_shard": "FlagEmbedding.indexing.encoding",
    "encode_shards": "FlagEmbedding.indexing.encoding",
    "finish": "FlagEmbedding.indexing.encoding",
    "merge": "FlagEmbedding.indexing.encoding",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
