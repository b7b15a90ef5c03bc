"""A checkpoint's files out of a draft into their folder, so that no reader meets a mixture of two."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from FlagEmbedding.modeling import adapters, interchange
from FlagEmbedding.modeling.heads import HEAD_FILES
from FlagEmbedding.utils.hub import ADAPTER_CONFIG

_LAST = ("config.json", ADAPTER_CONFIG)  # moved into place when the rest is there


def move_into_place(draft: Path, target: Path) -> None:
    """Move all files of ``draft``, what is read first last; remove what an older checkpoint left in their place."""
    files = [path.relative_to(draft) for path in draft.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file.name in _LAST and file.parent == Path()):
        (target / file.parent).mkdir(parents=True, exist_ok=True)
        os.replace(draft / file, target / file)
    owned = {*HEAD_FILES.values(), interchange.REMOTE_FILE.name, interchange.PROMPTS_FILE}
    stale = [target / name for name in owned]
    stale += [*target.glob("model-*-of-*.safetensors"), *target.glob("pytorch_model*.bin*")]
    stale += [target / "model.safetensors.index.json"]
    stale += [target / name for name in ("model.safetensors", "config.json")]  # where an adapter is alone now
    stale += [target / place / name for place in ("", adapters.FOLDER) for name in (ADAPTER_CONFIG, adapters.WEIGHTS)]
    modules = [*target.glob("[0-9]_Dense"), *target.glob("[0-9]_Normalize"), *target.glob(adapters.FOLDER)]
    stale += [folder / name for folder in modules for name in ("config.json", "model.safetensors")]
    for path in {*stale} - {target / file for file in files}:
        path.unlink(missing_ok=True)
    for folder in modules:
        with suppress(OSError):  # the new checkpoint's, or somebody's files are in it
            folder.rmdir()
