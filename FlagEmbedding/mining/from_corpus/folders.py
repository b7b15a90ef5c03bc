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
from FlagEmbedding.retrieval.approximate import remove_approximate
from FlagEmbedding.retrieval.index import remove_index
from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, clear_disk_errors, read_manifest
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.folders import remove_named
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

RECORD, _FOLDERS, _REJECTED, _REPORT = "from_corpus.json", ("train", "eval"), "rejected.jsonl", "report.md"
# What stands in the work folder beside folders of its own.
_WORK_FOLDERS = (*_FOLDERS, "given", "search")
_WORK_FILES = ("waiting*", "mined.jsonl", "pairs.jsonl", _REJECTED, ".*.journal*", ".*.tmp", ".*.lock*", "*.sqlite*")
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
        own = set(read_json(output / RECORD).get("files", ()))
        if strange := sorted(_held(output) - own):
            raise UsageError(
                f"{output / strange[0]} is not of the run that --overwrite True would replace: move it away"
            )
        return
    foreign = _without_record(output)
    if foreign and not output.with_name(f".{output.name}.work").exists():
        raise UsageError(
            f"{output / foreign[0]} is there, and no {RECORD} says that this command wrote it: name another folder"
        )


def _without_record(output: Path) -> list[str]:
    names = () if (output / RECORD).exists() else (*_FOLDERS, _REJECTED, _REPORT)
    return [name for name in names if (output / name).exists()]


def _held(output: Path) -> set[str]:
    """The files of the folders that are replaced, by their path in ``output``."""
    found = (path for name in _FOLDERS for path in (output / name).rglob("*") if not path.is_dir())
    return {path.relative_to(output).as_posix() for path in found}


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
                for name in _WORK_FOLDERS:
                    shutil.rmtree(work / name, ignore_errors=True)
                remove_named(work, *_WORK_FILES)


def clear_stale_index(
    folder: Path, corpus: Path, options: EncoderArguments, search: SearchArguments, own: bool
) -> None:
    """Remove an index, finished or not, that was made of another corpus or by another encoder or flags.

    Args:
        own: an earlier run of this command is known to have made it; what else stands there is refused.

    Raises:
        UserError: the encoder cannot be used, or the index is not this command's.
    """
    begun = read_manifest(folder / WORK / MANIFEST)
    manifest = read_manifest(folder / MANIFEST) or begun
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
        if not own:
            raise UsageError(
                f"{folder} is of another corpus or of other flags: move it away, or name another --output_dir"
            )
        logger.info("%s was made of another corpus, or with other flags: it is made again", folder)
        if begun is not None:
            ShardStore(folder / WORK, begun).remove()
        remove_approximate(folder)
        remove_index(folder)


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
        with atomic_open(output / _REPORT) as stream:
            stream.write(markdown(record))
        write_json_atomic(output / RECORD, {**record, "files": sorted(_held(output))})
