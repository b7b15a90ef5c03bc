"""What is to be encoded, before any of it is: the identity of an index, its shards, and where each begins.

A plan is plain values and paths. It lies in the working folder as ``shards/manifest.json``; whoever has it, in another
process or on another machine, encodes any shard of it without asking anyone (:func:`indexing.encoding.encode_shard`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from FlagEmbedding.collections.corpus import Survey, survey
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.claims import check_nobody_works
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.index import DOCID, INDEX
from FlagEmbedding.retrieval.shards import (
    MANIFEST,
    ShardStore,
    check_manifest,
    clear_disk_errors,
    decisive,
    read_manifest,
)
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import check_identity, differences, fingerprints
from FlagEmbedding.utils.locking import exclusive
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)
WORK, LOCK = "shards", ".shards.lock"


@lru_cache(maxsize=1)
def load_encoder(options: EncoderArguments) -> TextEncoder:
    """The encoder of some options, loaded once in a process."""
    return TextEncoder(options)


@dataclass(frozen=True)
class Plan:
    """An index to be made; it pickles.

    Attributes:
        files: the corpus, in order.
        folder: of the index.
        encoder: how passages are encoded; loaded where they are.
        options: of the index, with the instruction that the command or the checkpoint gives.
        manifest: identity, number of rows, shard size, passages and starts of each file, run.
    """

    files: tuple[Path, ...]
    folder: Path
    encoder: EncoderArguments
    options: IndexArguments
    manifest: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the index: language, encoder, texts, corpus."""
        return dict(self.manifest["identity"])

    @property
    def store(self) -> ShardStore:
        """Where the shards go."""
        return ShardStore(self.folder / WORK, self.manifest)

    def __len__(self) -> int:
        """How many shards there are; they are numbered from 0."""
        return len(self.store)

    def missing(self) -> list[int]:
        """Shards that are not on disk."""
        store = self.store
        finished = store.finished()
        return [shard for shard in range(len(store)) if shard not in finished]

    def check(self, encoder: TextEncoder) -> int:
        """The length in tokens at which passages are cut, where ``encoder`` gives this plan's vectors.

        Raises:
            UsageError: it gives others (another model, device or number format).
        """
        here = {**self.identity, **identity_of(encoder, self.identity["language"], self.options)}
        hint = "Plan on a machine like those that encode, and give all of them the same options"
        check_identity(decisive(self.identity), decisive(here), self.store.folder / MANIFEST, hint)
        return encoder.max_length(self.options.max_passage_length)


def plan(
    files: Sequence[Path], encoder: TextEncoder | EncoderArguments, folder: Path, lang: str = "corpus",
    options: IndexArguments | None = None,
) -> Plan | None:  # fmt: skip
    """The plan of an index of ``files`` in ``folder``: made now, or as another worker made it; None: it is there.

    The first to come reads the corpus, checks and hashes it; those who come meanwhile wait. Make it on a machine like
    those that will encode, since device and number format belong to the identity.

    Args:
        lang: what the corpus is called.

    Raises:
        UsageError: what is on disk was made by other arguments or another program.
        DataError: a corpus or a disk that cannot be used.
    """
    if options is not None and options.overwrite:
        raise UsageError("--overwrite True would remove what other workers encode; choose another --index_save_dir")
    encoder = encoder if isinstance(encoder, TextEncoder) else load_encoder(encoder)
    given = with_instruction(encoder, options or IndexArguments())
    identity = identity_of(encoder, lang, given)
    with ExitStack() as held:
        if not prepare(files, folder, identity, given, held, shared=True):
            return None
    return opened(files, folder, encoder.options, given)


def opened(files: Sequence[Path], folder: Path, encoder: EncoderArguments, options: IndexArguments) -> Plan:
    """The plan that :func:`prepare` left in the working folder."""
    manifest = read_manifest(folder / WORK / MANIFEST)
    if manifest is None:
        raise DataError(f"{folder / WORK} vanished; is --index_save_dir shared by all machines?")
    return Plan(tuple(files), folder, encoder, options, manifest)


def with_instruction(encoder: TextEncoder, options: IndexArguments) -> IndexArguments:
    """The options with the text before passages that they or the checkpoint give."""
    own = encoder.instruction("passage", options.passage_instruction_for_retrieval)
    return replace(options, passage_instruction_for_retrieval=own)


def identity_of(encoder: TextEncoder, lang: str, options: IndexArguments) -> dict[str, Any]:
    """What decides the vectors, but for the corpus."""
    max_length = encoder.max_length(options.max_passage_length)
    return {
        "language": lang,
        **encoder.describe(),
        "max_passage_length": max_length,
        "with_title": options.with_title,
        "passage_instruction": options.passage_instruction_for_retrieval,
        "slab_tokens": encoder.slab_tokens(encoder.options.batch_size, max_length),
        "shard_size": options.shard_size,
    }


def prepare(
    files: Sequence[Path], folder: Path, identity: dict[str, Any], options: IndexArguments, held: ExitStack,
    found: Survey | None = None, *, shared: bool = False,
) -> bool:  # fmt: skip
    """Decide what there is to do and open the working folder (main process); False: nothing to do.

    Args:
        held: gets the lock of the folder.
        shared: other workers may be encoding; wait for the lock, and leave what is theirs.
    """
    if _is_done(files, folder, identity, options):
        return False
    with clear_disk_errors(f"making {folder}"):
        held.enter_context(exclusive(folder / LOCK, folder, wait=shared))
    if _is_done(files, folder, identity, options):  # by the process that held the lock until now
        return False
    work, lang = folder / WORK, identity["language"]
    begun, done = read_manifest(work / MANIFEST), read_manifest(folder / MANIFEST)
    if begun is not None and not shared:
        check_nobody_works(ShardStore(work, begun))
    if found is None and (begun is None or options.overwrite):
        found = surveyed(files, lang, options)
    identity = {**identity, "corpus": _hashes(files, begun if shared else None)}
    if begun is not None:
        differing = differences(decisive(begun["identity"]), decisive(identity))
        if options.overwrite and (differing or same_run(begun, done)):
            ShardStore(work, begun).remove()
            begun = None
        else:
            check_manifest(begun, identity, work / MANIFEST)
    elif done is None:
        refuse_foreign(folder, INDEX, DOCID)
    logger.info(
        "%s: passages are %s", lang, "title and text (with_title)" if options.with_title else "text alone, as published"
    )
    if begun is not None:
        store = ShardStore(work, begun)
    else:
        assert found is not None
        more = {"starts": found.starts, "stored": _stored(files), "arguments": asdict(options)}
        store = ShardStore.create(
            work, identity, found.total, identity["dimension"], options.shard_size, passages=found.passages, **more
        )
    if not shared:
        store.forget_claims()
        store.clean()
    _check_room(store, folder)
    return True


def refuse_foreign(folder: Path, *names: str) -> None:
    """Raise ``UsageError`` where ``folder``, which has no manifest, holds files ``names``."""
    for name in names:
        if (folder / name).exists():
            raise UsageError(
                f"{folder / name} was not written by this program: move it away, or choose another --index_save_dir"
            )


def _hashes(files: Sequence[Path], begun: dict[str, Any] | None) -> list[dict[str, str]]:
    """Names and SHA-256 of the corpus files; those of ``begun`` where size and time say that it read the same files."""
    if begun is not None and begun.get("stored") == _stored(files):
        return list(begun["identity"]["corpus"])
    return fingerprints(files)


def _stored(files: Sequence[Path]) -> list[list[int]]:
    return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, files)]


def _is_done(files: Sequence[Path], folder: Path, identity: dict[str, Any], options: IndexArguments) -> bool:
    """Whether an index is there that stays; one of other arguments is refused."""
    if options.overwrite or not ((folder / INDEX).exists() and (folder / DOCID).exists()):
        return False
    lang = identity["language"]
    manifest, begun = read_manifest(folder / MANIFEST), read_manifest(folder / WORK / MANIFEST)
    if begun is not None and not same_run(begun, manifest):
        return False
    if manifest is None:
        logger.warning("%s: %s is there, made by another program and taken as it is", lang, folder)
        return True
    check_manifest(manifest, {**identity, "corpus": fingerprints(files)}, folder / MANIFEST)
    logger.info("%s: %s is there already (--overwrite True encodes again)", lang, folder)
    if begun is not None:  # a kill came between the index and the end of its shards
        ShardStore(folder / WORK, begun).remove()
    return True


def same_run(begun: dict[str, Any], done: dict[str, Any] | None) -> bool:
    """Whether shards that were begun are those that a finished index was joined of (its manifest ``done``)."""
    return done is not None and "run" in begun and begun["run"] == done.get("run")


def surveyed(files: Sequence[Path], lang: str, options: IndexArguments) -> Survey:
    """The corpus, checked and counted. Raises ``DataError``."""
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
