"""Candidates by other modes than dense, or by the union of several: what sparse finds hard, dense may not.

Lists of several modes take turns: first what is first in any of them, then what is second, in the order of the modes.
A candidate's score, which filters and margins compare with the positive's, is the dense one whatever mode found it, so
that one scale serves for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.indexing.arguments import IndexArguments, ModeArguments, StoreArguments
from FlagEmbedding.indexing.hybrid import HybridRetriever, ModeFolders
from FlagEmbedding.indexing.modes import build_modes
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.retrieval.searcher import Hit
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.modes import Mode


@dataclass(frozen=True)
class ModeCandidates:
    """Finds candidates by ``modes``. Open it with :meth:`open`."""

    retriever: HybridRetriever
    modes: Sequence[Mode]

    @classmethod
    def open(
        cls, dense: Retriever, modes: ModeArguments, corpus: Sequence[Path], label: str, with_title: bool
    ) -> ModeCandidates:
        """For a corpus whose dense index is there; folders of other modes are built beside it where they lack.

        Raises:
            UsageError: one that is there was made by other arguments.
        """
        folder, encoder = dense.index.folder, dense.encoder
        lexical = [part for part in modes.parts if part in ("sparse", "bm25")]  # colbert reranks what it encodes now
        label = ((dense.index.manifest or {}).get("identity") or {}).get("language", label)
        config = IndexArguments(dense.passage_length, with_title, dense.passage_instruction or "", allow_empty=True)
        build_modes(encoder, corpus, folder, label, config, StoreArguments([*lexical] or ["dense"]), lexical)
        folders = ModeFolders.open(folder, ["dense", *(p for p in modes.parts if p != "dense")], files=corpus)
        folders.check_encoder(encoder, "give the encoder and flags it was made with, or another --index_dir")
        retriever = HybridRetriever(
            encoder, folders, modes, query_length=dense.query_length, query_instruction=dense.query_instruction,
            threads=dense.threads,
        )  # fmt: skip
        return cls(retriever, modes.parsed)

    def find(self, queries: Sequence[str], vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """The candidates of each query in order, with dense scores; ``vectors`` are the queries'."""
        assert self.retriever.dense is not None
        found = self.retriever.find(queries, self.modes, top_k)
        lists = [self.retriever.join(found, mode, top_k) for mode in self.modes]
        results = []
        for vector, own in zip(vectors, zip(*lists, strict=True), strict=True):
            turns = chain.from_iterable(zip_longest(*own))
            docids = {hit.row: hit.docid for hit in turns if hit is not None}  # the first place of each counts
            rows = [*docids][:top_k]
            scores = self.retriever.dense.row_scores(rows, vector)
            results.append([Hit(docids[row], score, row) for row, score in zip(rows, scores, strict=True)])
        return results

    def describe(self) -> dict[str, Any]:
        """What decides the candidates beside the dense index."""
        files = {part: table.manifest["files"] for part, table in self.retriever.folders.tables.items()}
        return {"modes": [mode.name for mode in self.modes], "mode_files": digest(files)}
