"""Where a result came from: commit, versions, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

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


def provenance() -> dict[str, Any]:
    """What a result file carries: commit, package and library versions, platform, command line, time (UTC)."""
    from FlagEmbedding import __version__

    return {
        "commit": _commit(),
        "package_version": __version__,
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "argv": list(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
