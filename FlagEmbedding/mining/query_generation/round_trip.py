"""The round trip: does a query that was written for a passage bring that passage back?

The query is searched in the whole corpus by any checkpoint. A passage counts as found when a hit has its text, under
whatever docid; one that the corpus does not have is not judged. Ranks are kept in the cache of answers, chunk by chunk,
so a run that was killed embeds the rest in the same chunks and finds the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.mining.common.jobs import Progress
from FlagEmbedding.mining.common.negative_table import NegativeTable, Waiting
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, index_label, passages_of_rows
from FlagEmbedding.mining.hard_negatives.command import index_settings, load_encoder, prepare_index
from FlagEmbedding.mining.hard_negatives.miner import check_index, chunks
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.io import PathLike

_CHUNK = 2_048


class RoundTrip:
    """Searches for passages by the queries written for them.

    Args:
        retriever, store: the encoder with its index, and the texts of the same corpus.
        cache: keeps the ranks.
        top_k: how deep a passage may lie.
    """

    def __init__(self, retriever: Retriever, store: PassageStore, cache: AnswerCache, top_k: int) -> None:
        self.retriever, self.store, self.cache, self.top_k = retriever, store, cache, top_k
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
        progress = Progress("round trip")
        for chunk in chunks(items, _CHUNK):
            keys = [digest(self._identity, item.query, item.passage) for item in chunk]
            ranks = [self.cache.rank(key) for key in keys]
            missing = [i for i, rank in enumerate(ranks) if rank is None]
            if missing:
                found = self._search([chunk[i] for i in missing])
                self.cache.put_ranks([(keys[i], rank) for i, rank in zip(missing, found, strict=True)])
                for i, rank in zip(missing, found, strict=True):
                    ranks[i] = rank
            yield from ((item, bool(rank)) for item, rank in zip(chunk, ranks, strict=True))
            progress.step(len(chunk))

    def _search(self, items: Sequence[Waiting]) -> list[int]:
        """Rank of each item's passage, from 1; 0 where it is not among the first ``top_k``."""
        vectors = self.retriever.embed_queries([item.query for item in items])
        ranks = []
        for item, hits in zip(items, self.retriever.search(vectors, self.top_k), strict=True):
            wanted = text_key(item.passage)
            places = (rank for rank, hit in enumerate(hits, 1) if text_key(self.store[hit.row]) == wanted)
            ranks.append(next(places, 0))
        return ranks


def open_round_trip(a: Any, files: Sequence[PathLike], work: Path, cache: AnswerCache) -> RoundTrip:
    """The round trip that the flags describe (those of ``add_encoder_flags``, ``corpus``, ``round_trip_top_k``).

    Without ``--corpus`` the passages of the rows themselves are searched. Raises ``UserError``.
    """
    if a.corpus:
        corpus, label = corpus_files(a.corpus, work), a.language or index_label(a.corpus[0])
    else:
        corpus, label = passages_of_rows(files, work), f"{index_label(files[0])}-passages"
    settings = index_settings(a, label)
    store = PassageStore.prepare(corpus, work, settings.with_title)
    encoder = load_encoder(a)
    index = prepare_index(encoder, corpus, settings, label, a.batch_size)
    check_index(index, encoder, store)
    retriever = Retriever(
        encoder,
        index,
        query_length=a.query_max_length,
        passage_length=settings.max_length,
        query_instruction=a.query_instruction_for_retrieval,
        passage_instruction=settings.instruction,
        threads=a.threads,
    )
    return RoundTrip(retriever, store, cache, a.round_trip_top_k)
