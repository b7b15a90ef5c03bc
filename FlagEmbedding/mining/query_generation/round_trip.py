"""The round trip: does a query that was written for a passage bring that passage back?

The query is searched in the whole corpus by any checkpoint. A passage counts as found when a hit has its text, under
whatever docid; one that the corpus does not have is not judged. Ranks are kept in the cache of answers, chunk by chunk,
so a run that was killed embeds the rest in the same chunks and finds the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.mining.common.index import named_corpus, open_retriever
from FlagEmbedding.mining.common.jobs import chunks, progress
from FlagEmbedding.mining.common.negative_table import NegativeTable, Waiting
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.mining.query_generation.arguments import QueryOptions
from FlagEmbedding.utils.identity import digest


class RoundTrip:
    """Searches for passages by the queries written for them.

    Args:
        retriever, store: the encoder with its index, and the texts of the same corpus.
        cache: keeps the ranks.
        top_k: how deep a passage may lie.
        chunk_size: queries that are embedded and searched together.
    """

    def __init__(
        self, retriever: Retriever, store: PassageStore, cache: AnswerCache, top_k: int, chunk_size: int
    ) -> None:
        self.retriever, self.store, self.cache = retriever, store, cache
        self.top_k, self.chunk_size = top_k, chunk_size
        self._identity = digest(
            retriever.encoder.describe(),
            retriever.query_length,
            retriever.query_instruction,
            retriever.index.checksum(),
            top_k,
        )

    def mark_present(self, table: NegativeTable) -> None:
        """Tell ``table`` which of its passages the corpus has."""
        for row in range(self.store.rows):
            table.note_present(self.store[row])

    def judge(self, items: Iterable[Waiting]) -> Iterator[tuple[Waiting, bool]]:
        """Each item, and whether its query finds its passage. Memory: one chunk."""
        for chunk in progress("round trip, chunks", chunks(items, self.chunk_size)):
            keys = [digest(self._identity, item.query, item.passage) for item in chunk]
            ranks = [self.cache.rank(key) for key in keys]
            missing = [i for i, rank in enumerate(ranks) if rank is None]
            if missing:
                found = self._search([chunk[i] for i in missing])
                self.cache.put_ranks([(keys[i], rank) for i, rank in zip(missing, found, strict=True)])
                for i, rank in zip(missing, found, strict=True):
                    ranks[i] = rank
            yield from ((item, bool(rank)) for item, rank in zip(chunk, ranks, strict=True))

    def _search(self, items: Sequence[Waiting]) -> list[int]:
        """Rank of each item's passage, from 1; 0 where it is not among the first ``top_k``."""
        vectors = self.retriever.embed_queries([item.query for item in items])
        ranks = []
        for item, hits in zip(items, self.retriever.search(vectors, self.top_k), strict=True):
            wanted = text_key(item.passage)
            places = (rank for rank, hit in enumerate(hits, 1) if text_key(self.store[hit.row]) == wanted)
            ranks.append(next(places, 0))
        return ranks


def open_round_trip(options: QueryOptions, files: Sequence[Path], work: Path, cache: AnswerCache) -> RoundTrip:
    """The round trip that the flags describe; without ``--corpus`` the passages of the rows ``files`` are searched.

    Raises:
        UserError: the encoder, the corpus or the index cannot be used.
    """
    corpus = named_corpus(options.round_trip.corpus, options.writing.language, files, work)
    retriever, store = open_retriever(options.encoder, options.search, corpus, work)
    return RoundTrip(retriever, store, cache, options.round_trip.round_trip_top_k, options.search.search_batch_size)
