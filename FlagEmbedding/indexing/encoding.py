"""From a corpus to an index folder: shard after shard, resumable, shared out over processes.

One shard (``shard_size`` passages) is one window of the encoder: tokenised ahead, sorted by token count, cut into
slabs by token budget, written by a thread while the next one is computed. Nothing grows with the corpus. Process r of
w takes every w-th unfinished shard; since a shard's vectors depend on its passages alone, the index has the same bytes
with any number of processes and after any number of kills.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.collections.corpus import passage_text, stream, survey
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.inference.text_encoder import DENSE, TextEncoder
from FlagEmbedding.retrieval.approximate import index_paths
from FlagEmbedding.retrieval.index import DOCID, INDEX, assemble_index
from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, check_manifest, clear_disk_errors, read_manifest
from FlagEmbedding.utils.background import BackgroundWriter
from FlagEmbedding.utils.distributed import barrier, is_main, rank, world_size
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
WORK = "shards"
_REPORT_SECONDS = 10.0


def build_index(encoder: TextEncoder, files: Sequence[Path], folder: Path, lang: str, options: IndexArguments) -> bool:
    """Embed the corpus ``files`` into the index ``folder``; False when it was there already.

    Call it from every process. Raises ``UsageError`` when what is on disk was made by other arguments, ``DataError``
    for a corpus, a shard or a disk that cannot be used; finished shards stay and the same command goes on.
    """
    max_length = encoder.max_length(options.max_passage_length)
    own = encoder.instruction("passage", options.passage_instruction_for_retrieval)
    options = replace(options, passage_instruction_for_retrieval=own)
    identity = {
        "language": lang,
        **encoder.describe(),
        "max_passage_length": max_length,
        "with_title": options.with_title,
        "passage_instruction": options.passage_instruction_for_retrieval,
        "slab_tokens": encoder.slab_tokens(encoder.options.batch_size, max_length),
        "shard_size": options.shard_size,
    }
    if not on_main(lambda: _prepare(files, folder, identity, options)):
        return False
    store = ShardStore(folder / WORK, _manifest(folder))
    started = time.monotonic()
    _encode_missing(encoder, files, store, lang, options, max_length)
    barrier()
    on_main(lambda: _finish(store, folder, lang, options, time.monotonic() - started))
    return True


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder / WORK / MANIFEST)
    if manifest is None:
        raise DataError(f"{folder / WORK}: the working folder vanished; is --index_save_dir shared by all machines?")
    return manifest


def _prepare(files: Sequence[Path], folder: Path, identity: dict[str, Any], options: IndexArguments) -> bool:
    """Decide what there is to do and open the working folder (main process); False: nothing to do."""
    identity = {**identity, "corpus": fingerprints(files)}
    work, lang = folder / WORK, identity["language"]
    if options.overwrite and (work / MANIFEST).exists() and not _fits(work, identity):
        shutil.rmtree(work)
    store = ShardStore.open(work, identity)
    if store is None and not options.overwrite and (folder / INDEX).exists() and (folder / DOCID).exists():
        manifest = read_manifest(folder / MANIFEST)
        if manifest is None:
            logger.warning("%s: %s is there, made by another program and taken as it is", lang, folder)
        else:
            check_manifest(manifest, identity, folder / MANIFEST)
            logger.info("%s: %s is there already (--overwrite True encodes again)", lang, folder)
            shutil.rmtree(work, ignore_errors=True)  # a kill may have left some of it
        return False
    rule = "title and text (with_title)" if options.with_title else "text alone, as published"
    logger.info("%s: passages are %s", lang, rule)
    if store is None:
        logger.info("%s: checking %d corpus file(s)", lang, len(files))
        with clear_disk_errors("checking the corpus (temporary files)"):
            found = survey(files, options.allow_empty)
        if found.empty:
            logger.warning("%s: %d passage(s) without text are embedded as they are", lang, found.empty)
        store = ShardStore.create(
            work, identity, found.total, identity["dimension"], options.shard_size, passages=found.passages
        )
    store.clean()
    _check_room(store, folder)
    return True


def _fits(work: Path, identity: dict[str, Any]) -> bool:
    try:
        return ShardStore.open(work, identity) is not None
    except (DataError, UsageError):
        return False


def _check_room(store: ShardStore, folder: Path) -> None:
    """Say before the work, not after it, that the disk is too small: shards yet to come, and the index beside them."""
    rows = store.rows - len(store.finished()) * store.shard_size + store.rows
    needed, free = max(0, rows) * store.dimension * 4, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {store.rows} vectors of {store.dimension} need {needed / 1e9:.1f} GB more (shards and index), "
            f"{free / 1e9:.1f} GB are free; make room or choose another --index_save_dir"
        )


def _encode_missing(
    encoder: TextEncoder, files: Sequence[Path], store: ShardStore, lang: str, options: IndexArguments, max_length: int
) -> None:
    missing = [shard for shard in range(len(store)) if shard not in store.finished()]
    mine = missing[rank() :: world_size()]
    if len(missing) < len(store):
        logger.info("%s: going on, %d of %d shards are there", lang, len(store) - len(missing), len(store))
    passages = store.manifest["passages"]

    def windows() -> Iterator[tuple[list[str], tuple[int, list[str]]]]:
        prefix = options.passage_instruction_for_retrieval or ""
        for shard, found in zip(mine, stream(files, passages, [store.span(i) for i in mine]), strict=True):
            texts = [prefix + passage_text(passage, options.with_title) for passage in found]
            yield texts, (shard, [passage.docid for passage in found])

    progress = _Progress(store, lang)
    with BackgroundWriter(store.write) as write:
        for found, (shard, docids) in encoder.encode(windows(), max_length, DENSE, encoder.options.batch_size):
            assert found.dense is not None
            vectors = found.dense.float().cpu().numpy()
            _check_finite(vectors, docids)
            write(shard, vectors, docids)
            progress.report()


def _check_finite(vectors: np.ndarray, docids: list[str]) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise DataError(
            f"the vector of passage {docids[broken[0]]!r} is not finite; the model overflows in this --dtype, try fp32"
        )


def _finish(store: ShardStore, folder: Path, lang: str, options: IndexArguments, seconds: float) -> None:
    """Join the shards (main process) and drop the working folder."""
    for path in index_paths(folder):
        path.unlink()
    assemble_index(store, folder, arguments=asdict(options), processes=world_size(), provenance=provenance())
    with clear_disk_errors(f"removing {store.folder}"):
        store.remove()
    logger.info("%s: %d vectors of %d in %s (%s)", lang, store.rows, store.dimension, folder, _clock(seconds))


class _Progress:
    """Every ten seconds: passages done by all processes, passages a second of this run, time left."""

    def __init__(self, store: ShardStore, lang: str) -> None:
        self._store = store
        self._lang = lang
        self._first = self._done()
        self._started = self._last = time.monotonic()

    def _done(self) -> int:
        # The shards on disk are the one count that all processes share.
        return min(self._store.rows, len(self._store.finished()) * self._store.shard_size)

    def report(self) -> None:
        now = time.monotonic()
        if not is_main() or now - self._last < _REPORT_SECONDS:
            return
        done, rows = self._done(), self._store.rows
        if done == self._first:
            return
        self._last = now
        rate = (done - self._first) / (now - self._started)
        left = _clock((rows - done) / rate)
        logger.info(
            "%s: %s of %s passages (%.1f %%), %.1f passages/s, %s left",
            self._lang,
            f"{done:,}",
            f"{rows:,}",
            100 * done / rows,
            rate,
            left,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
