"""The output folder: what may be replaced there, and how new contents come in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from FlagEmbedding.indexing.planning import WORK
from FlagEmbedding.mining.from_corpus.report import markdown
from FlagEmbedding.retrieval.shards import MANIFEST, clear_disk_errors, read_manifest
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, write_json_atomic

RECORD, _FOLDERS, _REJECTED = "from_corpus.json", ("train", "eval"), "rejected.jsonl"


def check_folder(output: Path, overwrite: bool) -> None:
    """Refuse a folder that may not be written, before any work is done. A killed run may go on.

    Raises:
        UsageError: an earlier run's result without ``overwrite``; contents that this command did not write.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir {output} is a file: name a folder")
    if (output / RECORD).exists():
        if not overwrite:
            raise UsageError(f"{output} is there already: pass --overwrite True to replace it, or name another folder")
        return
    foreign = [name for name in _FOLDERS if (output / name).exists()]
    if foreign and not output.with_name(f".{output.name}.work").exists():
        raise UsageError(
            f"{output / foreign[0]} is there, and no {RECORD} says that this command wrote it: name another folder"
        )


def clear_foreign_index(folder: Path, corpus: Path) -> None:
    """Remove an index of ours that was made of another corpus."""
    manifest = read_manifest(folder / MANIFEST) or read_manifest(folder / WORK / MANIFEST)
    made_from = manifest["identity"].get("corpus") if manifest else None
    if made_from and [file["sha256"] for file in made_from] != [file["sha256"] for file in fingerprints([corpus])]:
        shutil.rmtree(folder)


def put_in_place(work: Path, output: Path, record: dict[str, Any]) -> None:
    """Move what lies ready in ``work`` to ``output``, replacing an earlier run's; the record is written last."""
    with clear_disk_errors(f"writing {output}"):
        output.mkdir(exist_ok=True)
        (output / RECORD).unlink(missing_ok=True)
        (output / _REJECTED).unlink(missing_ok=True)
        for name in _FOLDERS:
            if (output / name).exists():
                shutil.rmtree(output / name)
            if (work / name).exists():
                os.replace(work / name, output / name)
        if (work / _REJECTED).stat().st_size:
            os.replace(work / _REJECTED, output / _REJECTED)
        with atomic_open(output / "report.md") as stream:
            stream.write(markdown(record))
        write_json_atomic(output / RECORD, record)
