"""The vector stores of ``export vectors``: two that are loaded, three that are written as files for a bulk loader.

Scores are inner products everywhere, as in step 1. Layouts, as the stores document them:

- Qdrant: named vectors ``dense``, ``sparse`` and, compared by MaxSim, ``colbert``; a point's id is the passage's row.
- LanceDB and Parquet: columns ``row``, ``docid``, ``dense`` (fixed-size list), ``sparse_ids`` and ``sparse_weights``
  (lists), ``colbert`` (list of fixed-size lists), title, text.
- Milvus (bulk import of Parquet): ``docid`` is the VARCHAR primary key, ``dense`` a list of floats, ``sparse`` a JSON
  text {"token id": weight}; ``schema.json`` says what the collection must be created with. It has no field for a
  list of vectors, so ``colbert`` stays out.
- Elasticsearch (``_bulk``): an action line and a document line for each passage, weights by token id; ``mapping.json``
  is the body that creates the index.
"""

from __future__ import annotations

import glob
import importlib.util
import json
from abc import ABC, abstractmethod
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.folders import remove_named
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Fields:
    """What a passage has: width of its dense vector, lexical weights or not, width of its token vectors, texts."""

    dense: int
    sparse: bool
    colbert: int | None
    payload: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Passages from row ``first`` on.

    Attributes:
        dense: ``[n, width]`` float32.
        sparse: of each passage, token ids int32 (ascending) and weights float32 (above 0); or None.
        colbert: of each passage ``[tokens, width]`` float32; or None.
        payload: title and text, where asked for.
    """

    first: int
    docids: list[str]
    dense: np.ndarray
    sparse: list[tuple[np.ndarray, np.ndarray]] | None
    colbert: list[np.ndarray] | None
    payload: dict[str, list[str]]


class Store(ABC):
    """A place for batches.

    Args:
        folder: of what is written here.
        name: of the collection, table or index.
    """

    library: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = ()  # of the files that are written; a database keeps its own
    batch_rows: ClassVar[int] = 20_000

    def __init__(self, folder: Path, name: str, fields: Fields, url: str | None) -> None:
        self.folder, self.name, self.fields, self.url = folder, name, fields, url
        self.held = ExitStack()

    @classmethod
    def check_library(cls) -> None:
        """Raise ``UsageError`` where the store's library is missing."""
        if cls.library is not None and importlib.util.find_spec(cls.library) is None:
            raise UsageError(f"{cls.library} is missing: pip install 'FlagEmbedding[vectors]'")

    def begin(self, done: int) -> None:
        """Make ready for the row ``done``, of which nothing is there afterwards; 0: from nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def check_free(cls, name: str, url: str | None) -> None:
        """Raise ``UsageError`` where a server has something of that name, which no export of ours is known to be."""
        return  # a folder is asked by its record

    @classmethod
    def remove(cls, folder: Path, name: str) -> None:
        """Remove the files of an export, and the folder unless something else is in it."""
        remove_named(folder, *(pattern.format(glob.escape(name)) for pattern in cls.patterns))

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Add a batch; the same one may come twice, after a kill."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()


class Qdrant(Store):
    """A collection of Qdrant, on a server or in its local form."""

    library = "qdrant_client"
    batch_rows = 256

    @classmethod
    def check_free(cls, name: str, url: str | None) -> None:
        if url is None:
            return
        from qdrant_client import QdrantClient
        from qdrant_client.http.exceptions import ApiException

        try:
            with closing(QdrantClient(url=url, check_compatibility=False)) as client:
                there = client.collection_exists(name)
        except (ApiException, OSError, ValueError) as error:
            raise UsageError(f"--url {url}: no Qdrant answers there ({' '.join(str(error).split())[:120]})") from error
        if there:
            raise UsageError(f"--url {url} has a collection {name!r} already: give another --name, or remove it")

    def begin(self, done: int) -> None:
        from qdrant_client import QdrantClient, models

        super().begin(done)
        self.models = models
        self.client = QdrantClient(url=self.url) if self.url else QdrantClient(path=str(self.folder))
        self.held.callback(self.client.close)
        if done:
            if not self.client.collection_exists(self.name):
                raise DataError(f"Qdrant has no collection {self.name!r} any more: load it again with --overwrite True")
            return
        dot = models.Distance.DOT
        vectors = {"dense": models.VectorParams(size=self.fields.dense, distance=dot)}
        if self.fields.colbert:
            vectors["colbert"] = models.VectorParams(
                size=self.fields.colbert, distance=dot,
                multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
                hnsw_config=models.HnswConfigDiff(m=0),  # for reranking: no graph over token vectors
            )  # fmt: skip
        sparse = {"sparse": models.SparseVectorParams()} if self.fields.sparse else None
        self.client.delete_collection(self.name)
        self.client.create_collection(self.name, vectors_config=vectors, sparse_vectors_config=sparse)

    def write(self, batch: Batch) -> None:
        """Point ids are rows: a batch that comes again replaces itself."""
        points = []
        for place, docid in enumerate(batch.docids):
            vector: dict[str, Any] = {"dense": batch.dense[place].tolist()}
            if batch.sparse is not None and len(batch.sparse[place][0]):
                ids, weights = batch.sparse[place]
                vector["sparse"] = self.models.SparseVector(indices=ids.tolist(), values=weights.tolist())
            if batch.colbert is not None and len(batch.colbert[place]):
                vector["colbert"] = batch.colbert[place].tolist()
            payload = {"docid": docid} | {name: values[place] for name, values in batch.payload.items()}
            points.append(self.models.PointStruct(id=batch.first + place, vector=vector, payload=payload))
        self.client.upsert(self.name, points, wait=True)


def arrow_table(batch: Batch, fields: Fields) -> Any:
    """A batch as the columns of LanceDB and Parquet."""
    import pyarrow

    def fixed(vectors: np.ndarray, width: int) -> Any:
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1).astype("<f4")), width)

    def ragged(parts: list[np.ndarray], values: Any) -> Any:
        ends = np.cumsum([0, *(len(part) for part in parts)])
        return pyarrow.ListArray.from_arrays(
            pyarrow.array(ends, pyarrow.int32()), values
        )  # LanceDB takes no larger ones

    rows = np.arange(batch.first, batch.first + len(batch.docids))
    columns: dict[str, Any] = {
        "row": pyarrow.array(rows, pyarrow.int64()),
        "docid": pyarrow.array(batch.docids, pyarrow.string()),
        "dense": fixed(batch.dense, fields.dense),
    }
    if batch.sparse is not None:
        for name, dtype, parts in zip(
            ("sparse_ids", "sparse_weights"), ("<i4", "<f4"), zip(*batch.sparse, strict=True), strict=True
        ):
            values = np.concatenate(parts).astype(dtype)
            columns[name] = ragged(list(parts), pyarrow.array(values))
    if batch.colbert is not None and fields.colbert:
        columns["colbert"] = ragged(batch.colbert, fixed(np.concatenate(batch.colbert), fields.colbert))
    columns |= {name: pyarrow.array(values, pyarrow.string()) for name, values in batch.payload.items()}
    return pyarrow.table(columns)


class LanceDB(Store):
    """A table of LanceDB."""

    library = "lancedb"
    batch_rows = 10_000

    def begin(self, done: int) -> None:
        import lancedb

        super().begin(done)
        self.database = lancedb.connect(str(self.folder))
        self.table: Any = None
        if done:
            try:
                self.table = self.database.open_table(self.name)
            except ValueError as error:
                raise DataError(f"{self.folder} has no table {self.name!r} any more: --overwrite True") from error
            self.table.delete(f"row >= {done}")

    def write(self, batch: Batch) -> None:
        """The first batch makes the table."""
        rows = arrow_table(batch, self.fields)
        if self.table is None:
            self.table = self.database.create_table(self.name, rows, mode="overwrite")
        else:
            self.table.add(rows)


class Parquet(Store):
    """Numbered Parquet files."""

    patterns: ClassVar[tuple[str, ...]] = ("{}-*.parquet",)

    def write(self, batch: Batch) -> None:
        self.put(batch, arrow_table(batch, self.fields))

    def put(self, batch: Batch, table: Any) -> None:
        """Write ``table`` as the file of the batch."""
        import pyarrow.parquet

        with atomic_open(self.folder / f"{self.name}-{batch.first:09d}.parquet", "wb") as stream:
            pyarrow.parquet.write_table(table, stream)


class Milvus(Parquet):
    """Parquet files for Milvus's bulk import, and the schema of the collection."""

    patterns = (*Parquet.patterns, "schema.json")

    def begin(self, done: int) -> None:
        super().begin(done)
        if self.fields.colbert:
            logger.warning("Milvus has no field for a list of vectors: colbert is left out")
        text = [{"name": name, "type": "VARCHAR", "max_length": 65_535} for name in self.fields.payload]
        sparse = [{"name": "sparse", "type": "SPARSE_FLOAT_VECTOR", "metric": "IP"}] if self.fields.sparse else []
        dense = {"name": "dense", "type": "FLOAT_VECTOR", "dim": self.fields.dense, "metric": "IP"}
        key = {"name": "docid", "type": "VARCHAR", "max_length": 65_535, "is_primary": True}
        schema = {"collection": self.name, "fields": [key, dense, *sparse, *text]}
        write_json_atomic(self.folder / "schema.json", schema)

    def write(self, batch: Batch) -> None:
        import pyarrow

        columns: dict[str, Any] = {
            "docid": pyarrow.array(batch.docids, pyarrow.string()),
            "dense": pyarrow.array(list(batch.dense), pyarrow.list_(pyarrow.float32())),
        }
        if batch.sparse is not None:
            texts = [json.dumps(_weights(*entry)) for entry in batch.sparse]
            columns["sparse"] = pyarrow.array(texts, pyarrow.string())
        for name, values in batch.payload.items():
            long = next((place for place, text in enumerate(values) if len(text.encode()) > 65_535), None)
            if long is not None:
                raise DataError(
                    f"the {name} of {batch.docids[long]!r} is longer than the 65,535 bytes of a Milvus VARCHAR; leave "
                    f"{name} out of --payload"
                )
            columns[name] = pyarrow.array(values, pyarrow.string())
        self.put(batch, pyarrow.table(columns))


class Elasticsearch(Store):
    """NDJSON files for ``POST /_bulk``, and the mapping."""

    patterns = ("{}-*.ndjson", "mapping.json")
    batch_rows = 2_000  # of 1,024 numbers: some 25 MB, under the server's limit of 100

    def begin(self, done: int) -> None:
        super().begin(done)
        fields = self.fields
        properties: dict[str, Any] = {
            "docid": {"type": "keyword"},
            "dense": {
                "type": "dense_vector", "dims": fields.dense, "index": True, "similarity": "max_inner_product",
            },
        }  # fmt: skip
        if fields.sparse:
            properties["sparse"] = {"type": "sparse_vector"}
        if fields.colbert:
            properties["colbert"] = {"type": "rank_vectors", "dims": fields.colbert}
        properties |= {name: {"type": "text"} for name in fields.payload}
        write_json_atomic(self.folder / "mapping.json", {"mappings": {"properties": properties}})

    def write(self, batch: Batch) -> None:
        with atomic_open(self.folder / f"{self.name}-{batch.first:09d}.ndjson") as stream:
            for place, docid in enumerate(batch.docids):
                document: dict[str, Any] = {"docid": docid, "dense": _numbers(batch.dense[place])}
                if batch.sparse is not None:
                    document["sparse"] = _weights(*batch.sparse[place])
                if batch.colbert is not None and len(batch.colbert[place]):
                    document["colbert"] = [_numbers(vector) for vector in batch.colbert[place]]
                document |= {name: values[place] for name, values in batch.payload.items()}
                for line in ({"index": {"_index": self.name, "_id": docid}}, document):
                    stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _numbers(vector: np.ndarray) -> list[float]:
    """The shortest decimals that are read as these float32 numbers."""
    return [float(str(number)) for number in vector.astype(np.float32)]


def _weights(ids: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    return dict(zip(map(str, ids.tolist()), _numbers(weights), strict=True))


STORES: dict[str, type[Store]] = {
    "qdrant": Qdrant,
    "lancedb": LanceDB,
    "milvus": Milvus,
    "parquet": Parquet,
    "elasticsearch-json": Elasticsearch,
}
