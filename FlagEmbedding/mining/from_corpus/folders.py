"""The output folder: what may be replaced there, and how new contents come in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.planning import WORK, identity_of, with_instruction
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.mining.common.jobs import work_folder
from FlagEmbedding.mining.common.options import SearchArguments
from FlagEmbedding.mining.from_corpus.report import markdown
from FlagEmbedding.retrieval.shards import MANIFEST, clear_disk_errors, read_manifest
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

RECORD, _FOLDERS, _REJECTED = "from_corpus.json", ("train", "eval"), "rejected.jsonl"
# Of an index's identity: what its vectors may not differ in.
_DECISIVE = (
    "model", "pooling", "normalize_embeddings", "dimension", "max_passage_length", "with_title", "passage_instruction",
)  # fmt: skip


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
    foreign = _without_record(output)
    if foreign and not output.with_name(f".{output.name}.work").exists():
        raise UsageError(
            f"{output / foreign[0]} is there, and no {RECORD} says that this command wrote it: name another folder"
        )


def _without_record(output: Path) -> list[str]:
    return [] if (output / RECORD).exists() else [name for name in _FOLDERS if (output / name).exists()]


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """The hidden work folder beside ``output``, removed at the end, after an error too.

    It stays where an error came while contents were put in place: :func:`check_folder` tells by it whose they are.

    Raises:
        UsageError: another process works in it.
    """
    with work_folder(output) as work:
        try:
            yield work
        finally:
            if not _without_record(output):
                shutil.rmtree(work, ignore_errors=True)


def clear_stale_index(folder: Path, corpus: Path, options: EncoderArguments, search: SearchArguments) -> None:
    """Remove an index of ours, finished or not, that was made of another corpus or by another encoder or flags.

    Raises:
        UserError: the encoder cannot be used.
    """
    manifest = read_manifest(folder / MANIFEST) or read_manifest(folder / WORK / MANIFEST)
    if manifest is None:
        return
    there, encoder = manifest["identity"], TextEncoder(options)
    asked = IndexArguments(
        search.passage_max_length or IndexArguments.max_passage_length, bool(search.with_title),
        search.passage_instruction_for_retrieval,
    )  # fmt: skip
    here = identity_of(encoder, there["language"], with_instruction(encoder, asked))
    same_corpus = [file["sha256"] for file in there["corpus"]] == [file["sha256"] for file in fingerprints([corpus])]
    if not same_corpus or any(there[key] != here[key] for key in _DECISIVE):
        logger.info("%s was made of another corpus, or with other flags: it is made again", folder)
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
