"""Where a result came from: commit, versions, command."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

STRUCK = "***"
_SECRET = re.compile(r"^--?[\w-]*(token|key|password|secret)$", re.IGNORECASE)
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "faiss-cpu", "faiss-gpu", "ir_measures", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers; absent ones are left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    try:
        head = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head


def _git(folder: Path, *words: str) -> str:
    answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line whose tokens and keys (``--hub_token X``, ``--api_key=X``) are struck out."""
    return [
        f"{name}={STRUCK}" if equals and _SECRET.search(name) else STRUCK if before and _SECRET.search(before) else word
        for before, word, (name, equals, _) in zip(
            ["", *words], words, (word.partition("=") for word in words), strict=False
        )
    ]


def provenance() -> dict[str, Any]:
    """What a result file carries: commit, package and library versions, platform, command line, time (UTC)."""
    from FlagEmbedding import __version__

    return {
        "commit": _commit(),
        "package_version": __version__,
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "argv": without_secrets(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
