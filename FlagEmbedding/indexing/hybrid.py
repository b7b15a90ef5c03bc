"""Queries in, hits of every mode out: an encoder and the folders that it made of one corpus.

Dense, sparse and BM25 search the collection exactly; colbert reranks what they find (the M3 paper: 200 of dense), by
the vectors that step 0 stored, else by encoding those passages now; with ``rerank`` 0 it searches by itself. Each
candidate of a sum is scored by every part of it. Used by step 1 and by mining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.collections.corpus import passage_text, stream
from FlagEmbedding.indexing.arguments import ModeArguments
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.inference.lexical import TokenWeights, token_counts, token_weights
from FlagEmbedding.inference.scores import colbert_vectors
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.inference.tokenization import tokenize
from FlagEmbedding.retrieval.candidates import Asked, find
from FlagEmbedding.retrieval.fusion import Found, Fusing, fuse
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.late_interaction import Chunk, rerank, search_maxsim, stored_vectors
from FlagEmbedding.retrieval.lexical import Postings
from FlagEmbedding.retrieval.ragged import RaggedTable
from FlagEmbedding.retrieval.searcher import Hit
from FlagEmbedding.retrieval.shards import MANIFEST
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.modes import Mode, Part, parse_modes, parts_of

COLBERT: tuple[Kind, ...] = ("colbert",)
_PIECE = 256  # passages that are encoded together for colbert


@dataclass(frozen=True)
class ModeFolders:
    """What step 0 made of one corpus for some parts; ``files``: the corpus, for colbert vectors that are not stored.

    Open it with :meth:`open`.
    """

    folder: Path
    dense: FlatIndex | None
    tables: Mapping[Part, RaggedTable]
    files: Sequence[Path] = ()

    @classmethod
    def open(
        cls, folder: Path, parts: Sequence[Part], *, stored: bool = False, files: Sequence[Path] = ()
    ) -> ModeFolders:
        """Of an index folder.

        Args:
            stored: colbert vectors must be stored.

        Raises:
            DataError: one is missing or damaged, or they do not hold the same passages.
        """
        dense = FlatIndex(folder) if "dense" in parts else None
        there = [p for p in parts if p != "dense" and (p != "colbert" or stored or (folder / p / MANIFEST).is_file())]
        found = cls(folder, dense, {part: RaggedTable(folder / part) for part in there}, files)
        digests = {part: table.docids.sha256 for part, table in found.tables.items()}
        digests |= {"dense": dense.docids.sha256} if dense else {}
        if len(set(digests.values())) > 1:
            raise DataError(f"{folder}: {' and '.join(digests)} hold other passages: run step0 for all of them again")
        return found

    @property
    def docids(self) -> Sequence[str]:
        """Of the passages, by row."""
        return self.dense.docids if self.dense else next(iter(self.tables.values())).docids

    @property
    def rows(self) -> int:
        return len(self.docids)

    @property
    def manifest(self) -> dict[str, Any]:
        """How the passages were read."""
        tables: list[FlatIndex | RaggedTable] = [*([self.dense] if self.dense else []), *self.tables.values()]
        return next((each.manifest for each in tables if each.manifest), {})

    def check_encoder(self, encoder: TextEncoder, hint: str) -> None:
        """Refuse folders of another encoder (``UsageError``)."""
        tables: list[FlatIndex | RaggedTable] = [*([self.dense] if self.dense else []), *self.tables.values()]
        for table in tables:
            table.check_encoder(encoder.describe(), hint)


class HybridRetriever:
    """Searches by any modes.

    Args:
        folders: opened for the parts of ``modes``.
        modes: how parts are joined.
        query_length: tokens; the rest is cut off.
        query_instruction: put before every query, but for BM25.
        threads: of the search.

    Attributes:
        dense: searches the dense index, where there is one.
    """

    def __init__(
        self, encoder: TextEncoder, folders: ModeFolders, modes: ModeArguments, *, query_length: int = 512,
        query_instruction: str | None = None, threads: int = 1,
    ) -> None:  # fmt: skip
        self.encoder, self.folders, self.threads = encoder, folders, threads
        self.query_length, self.query_instruction = query_length, query_instruction
        self.dense: Retriever | None = None
        if folders.dense is not None:
            self.dense = Retriever(encoder, folders.dense, query_length, 512, query_instruction, threads=threads)
        first = parts_of(parse_modes(modes.rerank_from))
        self.how = Fusing(modes.weights, modes.rrf_k, modes.rerank, tuple(first))
        self.postings: dict[Part, Postings] = {
            part: Postings.open(table) for part, table in folders.tables.items() if part in ("sparse", "bm25")
        }

    def find(
        self, queries: Sequence[str], modes: Sequence[Mode], top_k: int, dense: list[list[Hit]] | None = None
    ) -> list[Found]:
        """Candidates of every query for ``modes``, with the scores of every part that takes part.

        Args:
            dense: hits of the dense search, where they are known.
        """
        encoded = self._encode(queries, parts_of([*modes, *(Mode((p,)) for m in modes for p in self.how.searching(m))]))

        def by_dense(depth: int) -> list[list[Hit]]:
            if dense is not None and all(len(hits) >= min(depth, self.folders.rows) for hits in dense):
                return dense
            assert self.dense is not None
            return self.dense.search(encoded.dense, depth)

        def dense_scores(query: int, rows: list[int]) -> list[float]:
            assert self.dense is not None
            return self.dense.row_scores(rows, encoded.dense[query])

        def lexical(part: Part) -> Callable[[int], np.ndarray]:
            return lambda query: self.postings[part].scores(encoded.lexical[part][query])

        threads, device = self.threads, self.encoder.device
        asked = Asked(
            self.folders.docids,
            len(queries),
            by_dense,
            dense_scores,
            {part: lexical(part) for part in encoded.lexical},
            lambda depth: search_maxsim(
                self.folders.tables["colbert"], encoded.colbert, depth, threads=threads, device=device
            ),
            lambda rows: rerank(encoded.colbert, rows, self._read_vectors(), threads=threads, device=device),
        )
        return find(asked, modes, self.how, top_k)

    def join(self, found: Sequence[Found], mode: Mode, top_k: int, how: Fusing | None = None) -> list[list[Hit]]:
        """The hits of one mode out of what :meth:`find` gave; ``how``: by other weights."""
        return [fuse(mode, each, how or self.how, self.folders.docids, top_k) for each in found]

    def search(self, queries: Sequence[str], mode: Mode, top_k: int) -> list[list[Hit]]:
        """The ``top_k`` best passages of each query."""
        return self.join(self.find(queries, [mode], top_k), mode, top_k)

    def _encode(self, queries: Sequence[str], parts: Sequence[Part]) -> _Queries:
        """What each of ``parts`` searches by."""
        encoder, skip = self.encoder, self.encoder.special_ids
        length, prefix = encoder.max_length(self.query_length), self.query_instruction or ""
        lexical: dict[Part, list[tuple[np.ndarray, np.ndarray]]] = {}
        if "bm25" in parts:  # the words alone
            lexical["bm25"] = token_counts(tokenize(encoder.tokenizer, queries, length), skip).texts()
        want: list[Kind] = [part for part in parts if part == "sparse" or part == "colbert"]
        weights, vectors = list[TokenWeights](), list[np.ndarray]()
        if want:
            texts = [prefix + query for query in queries]
            windows = ((texts[i : i + WINDOW], None) for i in range(0, len(texts), WINDOW))
            for found, _ in encoder.encode(windows, length, want, encoder.options.batch_size):
                weights += [token_weights(found, skip)] if "sparse" in want else []
                vectors += colbert_vectors(found) if "colbert" in want else []
        if "sparse" in want:
            lexical["sparse"] = TokenWeights.cat(weights).texts()
        dense = np.empty((len(queries), 0))
        if self.dense is not None and "dense" in parts:
            dense = self.dense.embed_queries(queries)
        return _Queries(dense, lexical, vectors)

    def _read_vectors(self) -> Any:
        if "colbert" in self.folders.tables:
            return stored_vectors(self.folders.tables["colbert"])
        return self._encode_passages

    def _encode_passages(self, rows: np.ndarray) -> Iterator[Chunk]:
        """Colbert vectors of passages of the corpus, read as they were for the index."""
        manifest, encoder, files = self.folders.manifest, self.encoder, self.folders.files
        identity = manifest.get("identity", {})
        if not files or "passages" not in manifest:
            raise DataError(
                f"{self.folders.folder}: no colbert vectors, and no manifest that says how passages were read: run "
                "step0 with --modes colbert"
            )
        if identity.get("corpus") != fingerprints(files):
            raise UsageError(f"{self.folders.folder} was made from other corpus files: run step 0 again")
        # The tokens of BM25 are those without instruction.
        said = None if identity.get("mode") == "bm25" else identity.get("passage_instruction") or ""
        prefix = encoder.instruction("passage", said) or ""
        spans = [(row, row + 1) for row in rows.tolist()]
        texts = (
            prefix + passage_text(passage, identity["with_title"])
            for passages in stream(files, manifest["passages"], spans)
            for passage in passages
        )

        def windows() -> Iterator[tuple[list[str], np.ndarray]]:
            for start in range(0, len(rows), _PIECE):
                own = rows[start : start + _PIECE]
                yield [next(texts) for _ in own], own

        length, size = identity["max_passage_length"], encoder.options.batch_size
        for found, own in encoder.encode(windows(), length, COLBERT, size):
            yield own, colbert_vectors(found)


@dataclass(frozen=True)
class _Queries:
    """Dense vectors of the queries, token ids and weights of each for sparse and bm25, its colbert vectors."""

    dense: np.ndarray
    lexical: dict[Part, list[tuple[np.ndarray, np.ndarray]]]
    colbert: list[np.ndarray]
