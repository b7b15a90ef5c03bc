"""``export vectors``: an index of step 0, batch by batch, into a vector store or the files that its loader takes.

Dense vectors are the field ``dense``; where step 0 also made them, lexical weights are ``sparse`` and token vectors
``colbert``. ``export.json`` counts the passages that are there: after a kill the same command goes on with the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from FlagEmbedding.collections.corpus import stream
from FlagEmbedding.collections.source import Source
from FlagEmbedding.export.arguments import VectorArguments
from FlagEmbedding.export.stores import STORES, Batch, Fields, Store
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.ragged import RaggedTable
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import as_json, check_identity, fingerprints
from FlagEmbedding.utils.io import read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.progress import progress
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
RECORD = "export.json"
MODES = ("sparse", "colbert")


@dataclass(frozen=True)
class Content:
    """An index with what lies beside it, by row."""

    index: FlatIndex
    modes: dict[str, Any]  # name → RaggedTable
    payload: Sequence[str]
    corpus: Sequence[Path]

    @property
    def fields(self) -> Fields:
        """What a store must make room for."""
        colbert = self.modes.get("colbert")
        width = None if colbert is None else int(colbert.arrays["vectors"].shape[1])
        return Fields(self.index.dimension, "sparse" in self.modes, width, tuple(self.payload))

    def batches(self, first: int, size: int) -> Iterator[Batch]:
        """From row ``first`` (a multiple of ``size``) to the last."""
        spans = [(start, min(start + size, self.index.rows)) for start in range(first, self.index.rows, size)]
        texts = self._texts(spans)
        for start, stop in spans:
            docids = self.index.docids[start:stop]
            rows = range(start, stop)
            sparse = colbert = None
            if table := self.modes.get("sparse"):
                sparse = [(entry["ids"], entry["weights"]) for entry in map(table.row, rows)]
            if table := self.modes.get("colbert"):
                colbert = [np.asarray(table.vectors(row)) for row in rows]
            yield Batch(start, docids, self.index.read_rows(rows), sparse, colbert, next(texts)(docids))

    def _texts(self, spans: Sequence[tuple[int, int]]) -> Iterator[Any]:
        """For each span what gives the payload of its docids, read from the corpus."""
        if not self.payload:
            for _ in spans:
                yield lambda docids: {}
            return
        for passages in stream(self.corpus, (self.index.manifest or {})["passages"], spans):

            def fields(docids: list[str], passages: list[Any] = passages) -> dict[str, list[str]]:
                if docids != [passage.docid for passage in passages]:
                    raise DataError(f"{self.corpus[0].parent}: its passages are not those of {self.index.folder}")
                return {name: [getattr(passage, name) for passage in passages] for name in self.payload}

            yield fields


def export_vectors(options: VectorArguments) -> Path:
    """Load or write the index; the folder with the record.

    Raises:
        UserError: an index or corpus that cannot be used, a missing library, a folder in the way.
    """
    STORES[options.to].check_library()
    content = _content(options)
    # A passage with token vectors weighs as much as some hundred without: Qdrant takes 32 MB a request.
    size = options.batch_rows or STORES[options.to].batch_rows // (16 if "colbert" in content.modes else 1)
    folder, record = Path(options.output_dir), Path(options.output_dir) / RECORD
    identity = as_json(_identity(options, content, size))
    if not record.is_file():
        STORES[options.to].check_free(options.name, options.url)
    done = _begin(options, identity, record)
    if done == content.index.rows:
        logger.info("%s holds all %d passages already (--overwrite True loads them again)", folder, done)
        return folder
    if done:
        logger.info("going on after %d of %d passages", done, content.index.rows)
    with clear_disk_errors(f"writing to {folder}"):
        store: Store = STORES[options.to](folder / options.to, options.name, content.fields, options.url)
        bar: tqdm[Any] = progress(options.to, total=content.index.rows, done=done)
        with store, bar:
            store.begin(done)
            for batch in content.batches(done, size):
                store.write(batch)
                done += len(batch.docids)
                write_json_atomic(record, {"identity": identity, "done": done, "provenance": provenance()})
                bar.update(len(batch.docids))
    logger.info("%s: %d passages, fields %s", folder, done, " ".join(["dense", *content.modes]))
    return folder


def _content(options: VectorArguments) -> Content:
    index = FlatIndex(options.index)
    modes = {}
    for mode in MODES:
        if (index.folder / mode / "manifest.json").is_file():
            table = RaggedTable(index.folder / mode)
            if table.docids.sha256 != index.docids.sha256:
                raise DataError(
                    f"{index.folder / mode}: its passages are not those of the dense index; run step 0 again"
                )
            modes[mode] = table
    corpus: Sequence[Path] = ()
    if options.payload:
        manifest = index.manifest
        if manifest is None or "passages" not in manifest:
            raise DataError(f"{index.folder} has no manifest that says which corpus it is of: leave --payload out")
        identity = manifest["identity"]
        corpus = Source(identity["language"], "dev", options.data_dir, options.cache_dir).corpus()
        hint = "Give the corpus that the index was made from (--data_dir), or leave --payload out"
        check_identity({"corpus": identity["corpus"]}, {"corpus": fingerprints(corpus)}, index.folder, hint)
    return Content(index, modes, options.payload, corpus)


def _identity(options: VectorArguments, content: Content, size: int) -> dict[str, Any]:
    tables = {mode: table.manifest["files"] for mode, table in content.modes.items()}
    return {
        "index": content.index.checksum(), "docids": content.index.docids.sha256, "modes": tables, "to": options.to,
        "url": options.url, "name": options.name, "payload": list(options.payload), "batch_rows": size,
        "rows": content.index.rows,
    }  # fmt: skip


def _begin(options: VectorArguments, identity: dict[str, Any], record: Path) -> int:
    """How many passages are there already; a folder of others, or of another export, is refused or cleared."""
    folder = record.parent
    there = read_json(record) if record.is_file() else None
    if there is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--output_dir {folder} is in the way: give a new or empty folder")
    elif options.overwrite:
        before, name = there["identity"]["to"], there["identity"]["name"]
        if STORES[before].library is not None and (before, name) != (options.to, options.name):
            raise UsageError(f"--output_dir {folder} holds {name!r} of {before}, a database: give another folder")
        if (options.url, options.name) != (there["identity"]["url"], name):
            STORES[options.to].check_free(options.name, options.url)
        with clear_disk_errors(f"replacing what is in {folder}"):
            STORES[before].remove(folder / before, name)
    else:
        hint = "Give the same options as before, --overwrite True, or another --output_dir"
        check_identity(there["identity"], identity, record, hint)
        return int(there["done"])
    with clear_disk_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(record, {"identity": identity, "done": 0})
    return 0
