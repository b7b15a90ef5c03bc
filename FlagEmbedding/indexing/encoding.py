"""From a corpus to an index folder: shard after shard, resumable, by any number of workers.

One shard (``shard_size`` passages) is one window of the encoder: tokenized ahead, sorted by token count, cut into
slabs by token budget, written by a thread while the next one is computed. Nothing grows with the corpus, which is read
twice: checked and hashed, then encoded. A worker claims shard after shard, beginning at its own part of the corpus and
then helping with the others'; since a shard's vectors depend on its passages alone, the index has the same bytes with
any number of workers and after any number of kills.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from FlagEmbedding.collections.corpus import Survey, passage_text, stream
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.claims import Claims
from FlagEmbedding.indexing.planning import (
    LOCK,
    WORK,
    Plan,
    identity_of,
    load_encoder,
    opened,
    prepare,
    refuse_foreign,
    with_instruction,
)
from FlagEmbedding.inference.text_encoder import DENSE, TextEncoder
from FlagEmbedding.retrieval.approximate import remove_approximate
from FlagEmbedding.retrieval.index import DOCID, INDEX, assemble_index
from FlagEmbedding.retrieval.shards import MANIFEST, ShardStore, check_manifest, clear_disk_errors, read_manifest
from FlagEmbedding.utils.background import BackgroundWriter
from FlagEmbedding.utils.distributed import barrier, rank, world_size
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.locking import exclusive
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.progress import progress
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
POLL = 1.0  # seconds between two looks at the shards that others are encoding


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
    options = with_instruction(encoder, options)
    identity = identity_of(encoder, lang, options)
    if found is not None and found.empty and not options.allow_empty:
        found = None  # one of its own says which passage it is
    with ExitStack() as held:
        if not on_main(lambda: prepare(files, folder, identity, options, held, found)):
            return False
        started, own = time.monotonic(), opened(files, folder, encoder.options, options)
        work(own, encoder, rank(), world_size())
        barrier()
        on_main(lambda: _join(own.store, folder, time.monotonic() - started, asdict(options)))
    return True


def work(plan: Plan, encoder: TextEncoder, part: int, parts: int, others: bool = True) -> None:
    """Encode what is missing of a plan together with other workers, until every shard is on disk.

    Args:
        part: of ``parts`` of the corpus, where this worker begins (modulo ``parts``).
        others: then help with the other parts; False: end with the own one, for workers that share no disk.
    """
    store, lang = plan.store, plan.identity["language"]
    missing = plan.missing()
    begin, end = (place * len(store) // parts for place in (part % parts, part % parts + 1))
    own = [shard for shard in missing if begin <= shard < end]
    rest = [shard for shard in missing if shard >= end] + [shard for shard in missing if shard < begin]
    order = own + rest if others else own
    if len(missing) < len(store):
        logger.info("%s: going on, %d of %d shards are there", lang, len(store) - len(missing), len(store))
    # Every worker has a like share: this one's tells of all. Listing the folder takes longer the more is in it.
    done = min(store.rows, (len(store) - len(missing)) * store.shard_size)
    bar: tqdm[Any] = progress(lang, total=store.rows, done=done)

    def encode(shards: Iterable[int]) -> int:
        count, last = 0, time.monotonic()
        for shard in encode_shards(plan, shards, encoder):
            count, now = count + 1, time.monotonic()
            claims.longest, last = max(claims.longest, now - last), now
            start, stop = store.span(shard)
            if rank() == 0:
                bar.update(min(parts * (stop - start), store.rows - bar.n))
        return count

    with Claims(store) as claims, bar:
        encode(claims.unclaimed(order))
        # Between two rounds nothing is claimed here, so that no two workers wait for each other.
        while left := _left(store, order):
            if not encode(claims.left_behind(left)):
                time.sleep(POLL)


def _left(store: ShardStore, order: Sequence[int]) -> list[int]:
    """Shards of ``order`` that are not on disk."""
    try:
        finished = store.finished() if order else set()
    except FileNotFoundError:  # joined, by a worker that saw the last shard before this one did
        return []
    return [shard for shard in order if shard not in finished]


def encode_shard(plan: Plan, shard: int, encoder: TextEncoder | None = None) -> None:
    """Encode one shard and write it to the plan's working folder. Pure and idempotent; needs no process group.

    Args:
        encoder: by default the plan's, loaded once in a process.

    Raises:
        UsageError: the encoder is not the plan's.
        DataError: a corpus that changed, a vector that is not finite, a disk that cannot be used.
    """
    for _ in encode_shards(plan, [shard], encoder):
        pass


def encode_shards(plan: Plan, shards: Iterable[int], encoder: TextEncoder | None = None) -> Iterator[int]:
    """:func:`encode_shard` for several, read and tokenized ahead; yields each when its vectors are computed.

    Args:
        shards: asked for one by one, a few before they are encoded; ascending ones read packed files once.
    """
    encoder = encoder or load_encoder(plan.encoder)
    options, max_length, store = plan.options, plan.check(encoder), plan.store
    asked: list[int] = []  # the shard whose passages are being read

    def spans() -> Iterator[tuple[int, int]]:
        for shard in shards:
            asked[:] = [shard]
            yield store.span(shard)

    def windows() -> Iterator[tuple[list[str], tuple[int, list[str]]]]:
        prefix = options.passage_instruction_for_retrieval or ""
        for found in stream(plan.files, plan.manifest["passages"], spans(), plan.manifest.get("starts", ())):
            texts = [prefix + passage_text(passage, options.with_title) for passage in found]
            yield texts, (asked[0], [passage.docid for passage in found])

    def put(shard: int, vectors: np.ndarray, docids: list[str]) -> None:
        # Another worker may have been faster, and may even have joined all shards.
        if (store.folder / MANIFEST).exists() and not store.path(shard, "json").exists():
            store.write(shard, vectors, docids)

    with BackgroundWriter(put) as write:
        for found, (shard, docids) in encoder.encode(windows(), max_length, DENSE, encoder.options.batch_size):
            assert found.dense is not None
            vectors = found.dense.float().cpu().numpy()
            _check_finite(vectors, docids)
            write(shard, vectors, docids)
            yield shard


def _check_finite(vectors: np.ndarray, docids: list[str]) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise DataError(
            f"the vector of passage {docids[broken[0]]!r} is not finite; the model overflows in this --dtype, try fp32"
        )


def finish(folder: Path) -> bool:
    """Join the shards in the working folder of ``folder`` into the index; False when it was there already.

    Loads no model and no corpus.

    Raises:
        DataError: nothing was begun, shards are missing or damaged, a disk that cannot be used.
        UsageError: another process is writing the index.
    """
    with exclusive(folder / LOCK, folder):
        manifest = read_manifest(folder / WORK / MANIFEST)
        if manifest is None:
            if read_manifest(folder / MANIFEST) is not None:
                logger.info("%s is there already", folder)
                return False
            raise DataError(f"{folder}: nothing was begun here; start workers with --shards first")
        store = ShardStore(folder / WORK, manifest)
        finished = store.finished()
        if missing := [shard for shard in range(len(store)) if shard not in finished]:
            raise DataError(
                f"{store.folder}: {len(missing)} of {len(store)} shards are missing, the first is {missing[0]}; start "
                "one or more workers again (--shards), which go on with these"
            )
        _join(store, folder, None, manifest.get("arguments"))
    return True


def merge(folders: Sequence[Path], folder: Path) -> int:
    """Bring the shards that workers without a shared disk have encoded into one working folder; how many came.

    Args:
        folders: of indexes of the same plan, each with some of its shards; they stay as they are.
        folder: of the index; :func:`finish` joins what is there.

    Raises:
        UsageError: the folders are of different encoders, corpora or options, also from an index that is in ``folder``.
        DataError: a folder without shards, or with a damaged one.
    """
    came = 0
    for place in folders:
        manifest = read_manifest(place / WORK / MANIFEST)
        if manifest is None:
            raise DataError(f"{place}: no {WORK} folder there; give index folders that workers (--shards) have written")
        with exclusive(folder / LOCK, folder):
            there, done = read_manifest(folder / WORK / MANIFEST), read_manifest(folder / MANIFEST)
            if done is not None and there is None:
                check_manifest(done, manifest["identity"], folder / MANIFEST)
                continue  # joined already, as finish says
            if there is None:
                refuse_foreign(folder, INDEX, DOCID)
                plain = {key: value for key, value in manifest.items() if key not in ("identity", "run")}
                target = ShardStore.create(folder / WORK, manifest["identity"], **plain)
            else:
                check_manifest(there, manifest["identity"], place / WORK / MANIFEST)
                target = ShardStore(folder / WORK, there)
            source = ShardStore(place / WORK, manifest)
            for shard in sorted(source.finished() - target.finished()):
                _bring(source, target, shard)
                came += 1
    return came


def _bring(source: ShardStore, target: ShardStore, shard: int) -> None:
    digests = source.digests(shard)
    with clear_disk_errors(f"copying shard {shard} to {target.folder}"):
        for suffix in digests:
            with atomic_open(target.path(shard, suffix), "wb") as stream:
                stream.write(source.path(shard, suffix).read_bytes())
        start, stop = target.span(shard)
        record = {"rows": stop - start, "run": target.manifest.get("run")}
        record |= {f"{suffix}_sha256": digest for suffix, digest in digests.items()}
        write_json_atomic(target.path(shard, "json"), record)


def _join(store: ShardStore, folder: Path, seconds: float | None, arguments: Any) -> None:
    """Join the shards (main process) and drop the working folder."""
    remove_approximate(folder)
    assemble_index(store, folder, arguments=arguments, processes=world_size(), provenance=provenance())
    with clear_disk_errors(f"removing {store.folder}"):
        store.remove()
    took = "" if seconds is None else f" ({tqdm.format_interval(seconds)})"
    lang = store.manifest["identity"].get("language")
    logger.info("%s: %d vectors of %d in %s%s", lang, store.rows, store.dimension, folder, took)
