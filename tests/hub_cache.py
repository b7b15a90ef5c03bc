"""The cache that huggingface_hub keeps, made without a hub."""

from __future__ import annotations

from pathlib import Path


def keep(cache: Path, repository: str, source: Path, kind: str = "model") -> Path:
    """Put ``source`` into ``cache`` as the one snapshot of ``repository`` (owner/name); the cache."""
    folder = cache / f"{kind}s--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(source)
    return cache
