"""From a corpus to an index folder: shard after shard, resumable, shared out over processes.

One shard (``shard_size`` passages) is one window of the encoder: tokenized ahead, sorted by token count, cut into
slabs by token budget, written by a thread while the next one is computed. Nothing grows with the corpus, which is read
twice: checked and hashed, then encoded. Process r of w takes every w-th unfinished shard; since a shard's vectors
depend on its passages alone, the index has the same bytes with any number of processes and after any number of kills.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from FlagEmbedding.collections.corpus import Survey, passage_text, stream, survey
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.inference.text_encoder import DENSE, TextEncoder
from FlagEmbedding.retrieval.approximate import remove_approximate
from FlagEmbedding.retrieval.index import DOCID, INDEX, assemble_index
from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, check_manifest, clear_disk_errors, read_manifest
from FlagEmbedding.utils.background import BackgroundWriter
from FlagEmbedding.utils.distributed import barrier, is_main, rank, world_size
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import differences, fingerprints
from FlagEmbedding.utils.locking import exclusive
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.progress import progress
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
WORK, LOCK = "shards", ".shards.lock"


def build_index(
    encoder: TextEncoder, files: Sequence[Path], folder: Path, lang: str, options: IndexArguments,
    found: Survey | None = None,
) -> bool:  # fmt: skip
    """Embed the corpus ``files`` into the index ``folder``; False when it was there already.

    Call it from every process. Finished shards stay on any error, and the same command goes on.

    Args:
        found: the survey of these files, where the main process has made it already.

    Raises:
        UsageError: what is on disk was made by other arguments or another program, or is being written.
        DataError: a corpus, a shard or a disk that cannot be used.
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
    if found is not None and found.empty and not options.allow_empty:
        found = None  # one of its own says which passage it is
    with ExitStack() as held:
        if not on_main(lambda: _prepare(files, folder, identity, options, held, found)):
            return False
        manifest = read_manifest(folder / WORK / MANIFEST)
        if manifest is None:
            raise DataError(f"{folder / WORK} vanished; is --index_save_dir shared by all machines?")
        store = ShardStore(folder / WORK, manifest)
        started = time.monotonic()
        _encode_missing(encoder, files, store, lang, options, max_length)
        barrier()
        on_main(lambda: _finish(store, folder, lang, options, time.monotonic() - started))
    return True


def _prepare(
    files: Sequence[Path], folder: Path, identity: dict[str, Any], options: IndexArguments, held: ExitStack,
    found: Survey | None,
) -> bool:  # fmt: skip
    """Decide what there is to do and open the working folder (main process); False: nothing to do."""
    if _is_done(files, folder, identity, options):
        return False
    with clear_disk_errors(f"making {folder}"):
        held.enter_context(exclusive(folder / LOCK, folder))
    if _is_done(files, folder, identity, options):  # by the process that held the lock until now
        return False
    work, lang = folder / WORK, identity["language"]
    begun, done = read_manifest(work / MANIFEST), read_manifest(folder / MANIFEST)
    if found is None and (begun is None or options.overwrite):
        found = _survey(files, lang, options)
    identity = {**identity, "corpus": fingerprints(files)}
    if begun is not None:
        if options.overwrite and (differences(begun["identity"], identity) or _same_run(begun, done)):
            ShardStore(work, begun).remove()
            begun = None
        else:
            check_manifest(begun, identity, work / MANIFEST)
    elif done is None and (there := [name for name in (INDEX, DOCID) if (folder / name).exists()]):
        raise UsageError(
            f"{folder / there[0]} was not written by this program: move it away, or choose another --index_save_dir"
        )
    logger.info(
        "%s: passages are %s", lang, "title and text (with_title)" if options.with_title else "text alone, as published"
    )
    if begun is not None:
        store = ShardStore(work, begun)
    else:
        assert found is not None
        store = ShardStore.create(
            work, identity, found.total, identity["dimension"], options.shard_size, passages=found.passages
        )
    store.clean()
    _check_room(store, folder)
    return True


def _is_done(files: Sequence[Path], folder: Path, identity: dict[str, Any], options: IndexArguments) -> bool:
    """Whether an index is there that stays; one of other arguments is refused."""
    if options.overwrite or not ((folder / INDEX).exists() and (folder / DOCID).exists()):
        return False
    lang = identity["language"]
    manifest, begun = read_manifest(folder / MANIFEST), read_manifest(folder / WORK / MANIFEST)
    if begun is not None and not _same_run(begun, manifest):
        return False
    if manifest is None:
        logger.warning("%s: %s is there, made by another program and taken as it is", lang, folder)
        return True
    check_manifest(manifest, {**identity, "corpus": fingerprints(files)}, folder / MANIFEST)
    logger.info("%s: %s is there already (--overwrite True encodes again)", lang, folder)
    if begun is not None:  # a kill came between the index and the end of its shards
        ShardStore(folder / WORK, begun).remove()
    return True


def _same_run(begun: dict[str, Any], done: dict[str, Any] | None) -> bool:
    return done is not None and "run" in begun and begun["run"] == done.get("run")


def _survey(files: Sequence[Path], lang: str, options: IndexArguments) -> Survey:
    logger.info("%s: checking %d corpus file(s)", lang, len(files))
    with clear_disk_errors("checking the corpus (temporary files)"):
        found = survey(files, options.allow_empty)
    if found.empty:
        logger.warning("%s: %d passage(s) without text are embedded as they are", lang, found.empty)
    return found


def _check_room(store: ShardStore, folder: Path) -> None:
    """Say before the work, not after it, that the disk is too small: shards yet to come, and the index beside them."""
    rows = store.rows - len(store.finished()) * store.shard_size + store.rows
    needed, free = max(0, rows) * store.dimension * 4, shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {store.rows} vectors of {store.dimension} need {tqdm.format_sizeof(needed, 'B')} more (shards "
            f"and index), {tqdm.format_sizeof(free, 'B')} are free; make room or choose another --index_save_dir"
        )


def _encode_missing(
    encoder: TextEncoder, files: Sequence[Path], store: ShardStore, lang: str, options: IndexArguments, max_length: int
) -> None:
    finished = store.finished()
    missing = [shard for shard in range(len(store)) if shard not in finished]
    mine = missing[rank() :: world_size()]
    if finished:
        logger.info("%s: going on, %d of %d shards are there", lang, len(finished), len(store))
    passages = store.manifest["passages"]

    def windows() -> Iterator[tuple[list[str], tuple[int, list[str]]]]:
        prefix = options.passage_instruction_for_retrieval or ""
        for shard, found in zip(mine, stream(files, passages, [store.span(i) for i in mine]), strict=True):
            texts = [prefix + passage_text(passage, options.with_title) for passage in found]
            yield texts, (shard, [passage.docid for passage in found])

    # The shards on disk are the one count that all processes share; listing them takes longer the more there are.
    bar: tqdm[Any] = progress(lang, total=store.rows, done=_rows_done(store))
    with BackgroundWriter(store.write) as write, bar:
        for found, (shard, docids) in encoder.encode(windows(), max_length, DENSE, encoder.options.batch_size):
            assert found.dense is not None
            vectors = found.dense.float().cpu().numpy()
            _check_finite(vectors, docids)
            write(shard, vectors, docids)
            if is_main() and time.time() - bar.last_print_t >= bar.mininterval:
                bar.update(_rows_done(store) - bar.n)


def _rows_done(store: ShardStore) -> int:
    return min(store.rows, len(store.finished()) * store.shard_size)


def _check_finite(vectors: np.ndarray, docids: list[str]) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise DataError(
            f"the vector of passage {docids[broken[0]]!r} is not finite; the model overflows in this --dtype, try fp32"
        )


def _finish(store: ShardStore, folder: Path, lang: str, options: IndexArguments, seconds: float) -> None:
    """Join the shards (main process) and drop the working folder."""
    remove_approximate(folder)
    assemble_index(store, folder, arguments=asdict(options), processes=world_size(), provenance=provenance())
    with clear_disk_errors(f"removing {store.folder}"):
        store.remove()
    duration = tqdm.format_interval(seconds)
    logger.info("%s: %d vectors of %d in %s (%s)", lang, store.rows, store.dimension, folder, duration)
