"""From a corpus to the folders of other modes than dense: lexical weights, token counts for BM25, colbert vectors.

Each lies in a folder of its own below the index folder (``retrieval.ragged``), with the rules of the dense index:
shards that are resumed and shared out over processes, bytes that depend on neither, a manifest with the identity. The
dense index is encoded apart (``indexing.encoding``) and has the same bytes whatever modes stand beside it; sparse and
colbert come out of one forward. A window of colbert vectors is large, so their shards hold an eighth of the passages,
and those of a sparse index that is begun together with it. BM25 reads tokens alone, without the passage instruction.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from FlagEmbedding.collections.corpus import Survey, passage_text, stream
from FlagEmbedding.indexing.arguments import IndexArguments, StoreArguments
from FlagEmbedding.indexing.planning import LOCK, WORK, refuse_foreign, same_run, surveyed
from FlagEmbedding.inference.lexical import TokenWeights, token_counts, token_weights
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.inference.tokenization import tokenize
from FlagEmbedding.retrieval.index import DOCID
from FlagEmbedding.retrieval.lexical import K1, B, bm25_impact, write_postings
from FlagEmbedding.retrieval.ragged import (
    IDS,
    LEXICAL,
    OFFSETS,
    WEIGHTS,
    Arrays,
    RaggedStore,
    RaggedTable,
    assemble_ragged,
    pack_vectors,
    vector_layout,
)
from FlagEmbedding.retrieval.shards import MANIFEST, check_manifest, clear_disk_errors, decisive, read_manifest
from FlagEmbedding.utils.background import BackgroundWriter
from FlagEmbedding.utils.distributed import barrier, is_main, rank, world_size
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import differences, fingerprints
from FlagEmbedding.utils.io import write_json_atomic
from FlagEmbedding.utils.locking import exclusive
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import PARTS, Part
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.progress import progress
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
_SMALLER = 8  # a shard of colbert vectors holds so many times fewer passages
_SAMPLED = 512  # passages whose tokens say how much room colbert vectors will need


@dataclass(frozen=True)
class _Plan:
    """What is to be encoded of one mode: where, and what decides it."""

    mode: Part
    folder: Path
    identity: dict[str, Any]
    layout: dict[str, tuple[str, int]]
    shard_size: int


def build_modes(
    encoder: TextEncoder, files: Sequence[Path], folder: Path, lang: str, options: IndexArguments,
    storing: StoreArguments, modes: Sequence[Part],
) -> None:  # fmt: skip
    """Embed the corpus ``files`` into ``folder/{mode}`` for each of ``modes`` (dense left out) that is not there.

    Call it from every process, as :func:`indexing.encoding.build_index`, whose errors these are too.
    """
    plans = [_plan(encoder, folder / mode, lang, options, storing, mode, modes) for mode in modes if mode != "dense"]
    with ExitStack() as held:
        open_now = on_main(lambda: [plan.mode for plan in _prepare(encoder, files, plans, options, held)])
        begun = [(plan, _store(plan)) for plan in plans if plan.mode in open_now]
        # What comes out of one forward and lies in shards of one size is encoded together.
        begun.sort(key=lambda each: (each[0].mode == "bm25", each[1].shard_size, PARTS.index(each[0].mode)))
        for _, group in groupby(begun, key=lambda each: (each[0].mode == "bm25", each[1].shard_size)):
            together, started = list(group), time.monotonic()
            _encode_missing(encoder, files, together, options)
            barrier()
            on_main(partial(_finish_all, together, options, storing, started))


def _plan(
    encoder: TextEncoder, folder: Path, lang: str, options: IndexArguments, storing: StoreArguments, mode: Part,
    modes: Sequence[Part],
) -> _Plan:  # fmt: skip
    max_length = encoder.max_length(options.max_passage_length)
    described = encoder.describe()
    width: int = described.pop("dimension")
    instruction = encoder.instruction("passage", options.passage_instruction_for_retrieval)
    identity = {
        "mode": mode, "language": lang, **described, "max_passage_length": max_length,
        "with_title": options.with_title, "passage_instruction": None if mode == "bm25" else instruction,
        "slab_tokens": encoder.slab_tokens(encoder.options.batch_size, max_length),
    }  # fmt: skip
    layout = LEXICAL
    if mode == "bm25":  # tokens alone decide it
        kept = ("mode", "language", "model", "max_passage_length", "with_title", "passage_instruction")
        identity = {**{key: identity[key] for key in kept}, "k1": K1, "b": B}
    if mode == "colbert":
        head = encoder.encoder.colbert_linear
        assert head is not None
        width = head.out_features
        identity |= {"vector_type": storing.vector_type, "colbert_dim": width}
        layout = vector_layout(storing.vector_type, width)
    shard_size = options.shard_size
    if mode != "bm25" and "colbert" in modes:
        shard_size = max(1, shard_size // _SMALLER)
    return _Plan(mode, folder, identity, layout, shard_size)


def _store(plan: _Plan) -> RaggedStore:
    manifest = read_manifest(plan.folder / WORK / MANIFEST)
    if manifest is None:
        raise DataError(f"{plan.folder / WORK} vanished; is --index_save_dir shared by all machines?")
    return RaggedStore(plan.folder / WORK, manifest)


def _prepare(
    encoder: TextEncoder, files: Sequence[Path], plans: Sequence[_Plan], options: IndexArguments, held: ExitStack
) -> list[_Plan]:
    """Open the working folder of every mode that is not there yet (main process)."""
    found: Survey | None = None
    begun = []
    for plan in plans:
        if _is_done(files, plan, options):
            continue
        with clear_disk_errors(f"making {plan.folder}"):
            held.enter_context(exclusive(plan.folder / LOCK, plan.folder))
        if _is_done(files, plan, options):
            continue
        work, identity = plan.folder / WORK, {**plan.identity, "corpus": fingerprints(files)}
        there, done = read_manifest(work / MANIFEST), read_manifest(plan.folder / MANIFEST)
        if there is not None and options.overwrite:
            if differences(decisive(there["identity"]), decisive(identity)) or same_run(there, done):
                RaggedStore(work, there).remove()
                there = None
        elif there is not None:
            check_manifest(there, identity, work / MANIFEST)
        elif done is None:
            refuse_foreign(plan.folder, DOCID, OFFSETS)
        if there is None:
            found = found or surveyed(files, plan.identity["language"], options)
            width = plan.identity.get("colbert_dim", 1)
            more = {"passages": found.passages, "layout": {n: list(each) for n, each in plan.layout.items()}}
            there = RaggedStore.create(work, identity, found.total, width, plan.shard_size, **more).manifest
        store = RaggedStore(work, there)
        store.clean()
        begun.append(plan)
        if plan.mode == "colbert":
            _say_room(encoder, files, store, plan, options)
    return begun


def _is_done(files: Sequence[Path], plan: _Plan, options: IndexArguments) -> bool:
    manifest = read_manifest(plan.folder / MANIFEST)
    if options.overwrite or manifest is None:
        return False
    begun = read_manifest(plan.folder / WORK / MANIFEST)
    if begun is not None and not same_run(begun, manifest):
        return False
    check_manifest(manifest, {**plan.identity, "corpus": fingerprints(files)}, plan.folder / MANIFEST)
    lang = plan.identity["language"]
    logger.info("%s: %s is there already (--overwrite True encodes again)", lang, plan.folder)
    if begun is not None:  # a kill came between the index and the end of its shards
        RaggedStore(plan.folder / WORK, begun).remove()
    return True


def _say_room(
    encoder: TextEncoder, files: Sequence[Path], store: RaggedStore, plan: _Plan, options: IndexArguments
) -> None:
    """Say how much room colbert vectors will take, by the tokens of the first passages, and refuse what has none."""
    first = next(stream(files, store.manifest["passages"], [(0, min(store.rows, _SAMPLED))]))
    texts = [_prefix(plan) + passage_text(passage, options.with_title) for passage in first]
    tokens = len(tokenize(encoder.tokenizer, texts, plan.identity["max_passage_length"]).ids) / len(texts) - 1
    each = sum(np.dtype(dtype).itemsize * width for dtype, width in plan.layout.values())
    whole = round(tokens * store.rows * each)
    todo = 1 - min(store.rows, len(store.finished()) * store.shard_size) / max(1, store.rows)
    needed, free = round(whole * (1 + todo)), shutil.disk_usage(plan.folder).free
    said = "%s: colbert vectors of %d (%s), about %.0f per passage, will take about %s, twice that while they are made"
    size = tqdm.format_sizeof
    logger.info(said, plan.folder, store.dimension, plan.identity["vector_type"], tokens, size(whole, "B"))
    if needed > free:
        raise DataError(
            f"{plan.folder}: {store.rows} passages of about {tokens:.0f} colbert vectors need {size(needed, 'B')}, "
            f"{size(free, 'B')} are free; give --colbert_type int8, leave colbert out (step 1 then encodes what it "
            "reranks), or train with --colbert_dim 128"
        )


def _prefix(plan: _Plan) -> str:
    return plan.identity["passage_instruction"] or ""


def _encode_missing(
    encoder: TextEncoder, files: Sequence[Path], begun: Sequence[tuple[_Plan, RaggedStore]], options: IndexArguments
) -> None:
    """Every shard that one of the stores lacks, into those that lack it."""
    finished = on_main(lambda: [store.finished() for _, store in begun])  # one listing for all: each takes its share
    plan, store = begun[0]
    missing = [shard for shard in range(len(store)) if not all(shard in own for own in finished)]
    mine = missing[rank() :: world_size()]
    lang, names = plan.identity["language"], "+".join(plan.mode for plan, _ in begun)
    if len(missing) < len(store):
        logger.info("%s: %s goes on, %d of %d shards are there", lang, names, len(store) - len(missing), len(store))

    def windows() -> Iterator[tuple[list[str], tuple[int, list[str]]]]:
        spans = [store.span(i) for i in mine]
        for shard, found in zip(mine, stream(files, store.manifest["passages"], spans), strict=True):
            texts = [_prefix(plan) + passage_text(passage, options.with_title) for passage in found]
            yield texts, (shard, [passage.docid for passage in found])

    def put(shard: int, docids: list[str], rows: list[tuple[np.ndarray, Arrays]]) -> None:
        for (_, own), there, (lengths, arrays) in zip(begun, finished, rows, strict=True):
            if shard not in there:
                own.put(shard, lengths, arrays, docids)

    total = store.rows
    bar: tqdm[Any] = progress(f"{lang} {names}", total=total, done=total - min(total, len(missing) * store.shard_size))
    with BackgroundWriter(put) as write, bar:
        for rows, (shard, docids) in _rows(encoder, windows(), [plan for plan, _ in begun]):
            write(shard, docids, rows)
            if is_main():
                bar.update(min(world_size() * len(docids), total - bar.n))


def _rows(
    encoder: TextEncoder, windows: Iterator[tuple[list[str], tuple[int, list[str]]]], plans: Sequence[_Plan]
) -> Iterator[tuple[list[tuple[np.ndarray, Arrays]], tuple[int, list[str]]]]:
    """Entries of each window for each of the plans: entries per row, and the arrays."""
    skip, max_length = encoder.special_ids, plans[0].identity["max_passage_length"]
    if plans[0].mode == "bm25":
        for window in encoder.pool.windows(windows, max_length):
            yield [_lexical(token_counts(window.tokens, skip))], window.extra
        return
    want: list[Kind] = [plan.mode for plan in plans if plan.mode != "bm25"]
    for found, (shard, docids) in encoder.encode(windows, max_length, want, encoder.options.batch_size):
        rows: list[tuple[np.ndarray, Arrays]] = []
        for plan in plans:
            if plan.mode == "sparse":
                own = token_weights(found, skip)
                _check_finite(own.weights, own.lengths, docids)
                rows.append(_lexical(own))
            else:
                assert found.colbert is not None
                vectors = found.colbert.float().cpu().numpy()
                lengths = np.array(found.tokens.lengths) - 1
                _check_finite(vectors, lengths, docids)
                rows.append((lengths, pack_vectors(vectors, plan.identity["vector_type"])))
        yield rows, (shard, docids)


def _lexical(found: TokenWeights) -> tuple[np.ndarray, Arrays]:
    return found.lengths, {IDS: found.ids, WEIGHTS: found.weights}


def _check_finite(values: np.ndarray, lengths: np.ndarray, docids: list[str]) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        row = int(np.searchsorted(np.cumsum(lengths), int(np.flatnonzero(~finite)[0]), side="right"))
        raise DataError(f"what was computed of passage {docids[row]!r} is not finite; try --dtype fp32")


def _finish_all(
    together: Sequence[tuple[_Plan, RaggedStore]], options: IndexArguments, storing: StoreArguments, started: float
) -> None:
    for plan, store in together:
        _finish(plan, store, options, storing, time.monotonic() - started)


def _finish(plan: _Plan, store: RaggedStore, options: IndexArguments, storing: StoreArguments, seconds: float) -> None:
    """Join the shards (main process), make the inverted index, drop the working folder."""
    folder, lang = plan.folder, plan.identity["language"]
    manifest = assemble_ragged(store, folder)
    if IDS in store.layout:
        shapes = {n: (file["dtype"], tuple(file["shape"])) for n, file in manifest["files"].items() if n != DOCID}
        offsets, ids, weights = (_mapped(folder / n, *shapes[n]) for n in (OFFSETS, IDS, WEIGHTS))
        impact = bm25_impact(offsets, ids, weights) if plan.mode == "bm25" else None
        manifest["files"] |= write_postings(folder, offsets, ids, weights, impact)
        if not len(ids) and plan.mode == "sparse":
            logger.warning(
                "%s: no token of any passage has a weight above 0: the sparse head has learned nothing", lang
            )
    told = {**asdict(options), **asdict(storing)}
    with clear_disk_errors(f"writing {folder / MANIFEST}"):
        write_json_atomic(
            folder / MANIFEST, {**manifest, "arguments": told, "processes": world_size(), "provenance": provenance()}
        )
    table = RaggedTable(folder)  # as every reader opens it
    with clear_disk_errors(f"removing {store.folder}"):
        store.remove()
    said = "%s: %s of %d passages, %d entries in %s (%s)"
    logger.info(said, lang, plan.mode, table.rows, manifest["entries"], folder, tqdm.format_interval(seconds))


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "r", shape=shape) if 0 not in shape else np.empty(shape, dtype)
