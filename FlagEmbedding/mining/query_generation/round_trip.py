"""The round trip: does a query that was written for a passage bring that passage back?

The query is searched in the whole corpus by any checkpoint. A passage counts as found when a hit has its text, under
whatever docid; one that the corpus does not have is not judged. Ranks are kept in the cache of answers, chunk by chunk,
so a run that was killed embeds the rest in the same chunks and finds the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from FlagEmbedding.mining.common.index import named_corpus, open_retriever
from FlagEmbedding.mining.common.jobs import chunks, progress
from FlagEmbedding.mining.common.negative_table import NegativeTable, Waiting
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.mining.query_generation.arguments import QueryOptions
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.texts import text_key


class RoundTrip:
    """Searches for passages by the queries written for them.

    Args:
        options: encoder, corpus, index and depth; without ``--corpus`` the passages of the rows are searched.
        files: the rows.
        work: a folder for scratch files.
        cache: keeps the ranks.

    Raises:
        UserError: the encoder, the corpus or the index cannot be used.
    """

    def __init__(self, options: QueryOptions, files: Sequence[Path], work: Path, cache: AnswerCache) -> None:
        corpus = named_corpus(options.round_trip.corpus, options.writing.language, files, work)
        self.retriever, self.store = open_retriever(options.encoder, options.search, corpus, work)
        self.cache, self.top_k = cache, options.round_trip.round_trip_top_k
        self.chunk_size = options.search.search_batch_size
        found = self.retriever
        how = (found.encoder.describe(), found.query_length, found.query_instruction, found.index.checksum())
        self._identity = digest(*how, self.top_k)

    def mark_present(self, table: NegativeTable) -> None:
        """Tell ``table`` which of its passages the corpus has."""
        for row in range(self.store.rows):
            table.note_present(self.store[row])

    def judge(self, items: Iterable[Waiting]) -> Iterator[tuple[Waiting, bool]]:
        """Each item, and whether its query finds its passage. Memory: one chunk."""
        for chunk in progress("round trip, chunks", chunks(items, self.chunk_size)):
            keys = [digest(self._identity, item.query, item.passage) for item in chunk]
            ranks = {key: self.cache.rank(key) for key in keys}
            missing = [(key, item) for key, item in zip(keys, chunk, strict=True) if ranks[key] is None]
            if missing:
                found = self._search([item for _, item in missing])
                filed = [(key, rank) for (key, _), rank in zip(missing, found, strict=True)]
                self.cache.put_ranks(filed)
                ranks.update(filed)
            yield from ((item, bool(ranks[key])) for key, item in zip(keys, chunk, strict=True))

    def _search(self, items: Sequence[Waiting]) -> list[int]:
        """Rank of each item's passage, from 1; 0 where it is not among the first ``top_k``."""
        vectors = self.retriever.embed_queries([item.query for item in items])
        ranks = []
        for item, hits in zip(items, self.retriever.search(vectors, self.top_k), strict=True):
            wanted = text_key(item.passage)
            places = (rank for rank, hit in enumerate(hits, 1) if text_key(self.store[hit.row]) == wanted)
            ranks.append(next(places, 0))
        return ranks
