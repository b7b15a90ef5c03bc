"""From queries to negatives: embed, search, filter, choose. Used by the command and between epochs of training.

Queries go in chunks: a chunk is embedded as one window and searched in one pass over the index, which is read from
disk block by block. So memory holds one chunk's candidates whatever the corpus, and a chunk gives the same scores
whenever it is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import numpy as np

from FlagEmbedding.indexing.retriever import Retriever, inner_products
from FlagEmbedding.mining.common.alignment import realign, written
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.common.queries import Item
from FlagEmbedding.mining.common.reranker import Reranker
from FlagEmbedding.mining.hard_negatives.candidates import ModeCandidates
from FlagEmbedding.mining.hard_negatives.filters import Candidate, NegativeFilter, Sampling, ScoreFilters, choose
from FlagEmbedding.retrieval.searcher import Hit

_RANDOM_TRIES = 16
_SAME_SCORE = 5e-3  # equal vectors score the same, but for the rounding of half precision


@dataclass
class Mined:
    """What was found for one query; ``note`` is its part of the report."""

    item: Item
    negatives: list[Candidate]
    positive_scores: list[float] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Miner:
    """Finds negatives for items.

    Attributes:
        store: the corpus.
        sampling: window, number, seed.
        filters: limits on scores.
        retriever: None draws every negative at random from the corpus.
        reranker: gives the scores that the filters (and the rows) see, in place of the retriever's.
        candidates: finds candidates by other modes than the retriever's dense search.
    """

    store: PassageStore
    sampling: Sampling
    filters: ScoreFilters
    retriever: Retriever | None = None
    reranker: Reranker | None = None
    candidates: ModeCandidates | None = None

    def mine(self, items: Sequence[Item], skip: int = 0) -> Iterator[Mined]:
        """One chunk: what was found for each item, in order, without the first ``skip`` (already known)."""
        if self.retriever is None:
            yield from map(self._draw, items[skip:])
            return
        queries = [item.query for item in items]
        vectors = self.retriever.embed_queries(queries)
        if self.candidates is None:
            hits = self.retriever.search(vectors, self.sampling.depth)
        else:
            hits = self.candidates.find(queries, vectors, self.sampling.depth)
        positives = self._positive_scores(items, vectors)
        for found in islice(zip(items, vectors, hits, positives, strict=True), skip, None):
            yield self._mine_one(*found)

    def _positive_scores(self, items: Sequence[Item], vectors: np.ndarray) -> list[list[float]]:
        """The score of each item's positives: from the index where their rows are known, else embedded here."""
        assert self.retriever is not None
        rows = [row for item in items for row in item.positive_rows]
        texts = [text for item in items if not item.positive_rows for text in item.positives]
        stored = iter(self.retriever.index.read_rows(rows))
        embedded = iter(self.retriever.embed_passages(texts))
        found = []
        for item, vector in zip(items, vectors, strict=True):
            source = stored if item.positive_rows else embedded
            found.append(inner_products(np.stack(list(islice(source, len(item.positives)))), vector))
        return found

    def _mine_one(self, item: Item, vector: np.ndarray, hits: list[Hit], positives: list[float]) -> Mined:
        sampling, generator, (first, last) = self.sampling, self.sampling.generator(item.key), self.sampling.window
        own = positives
        found_here = self._candidates(hits[first:last])
        twins = self._twins(item, found_here, positives)
        window = self._rescored(item, found_here)
        if self.reranker is not None:
            positives = self.reranker.score(item.query, item.positives)
        rules = self._rules(item, min(positives), twins)
        kept, counts = rules.apply(window)
        chosen = choose(kept, sampling, generator)
        found = len(chosen)
        missing = sampling.negative_number - found
        if missing and sampling.fill != "none":
            below = self._candidates(hits[last:])
            more = below if sampling.fill == "next" else self._random(generator, missing, vector)
            rules.twins |= self._twins(item, more, own)
            chosen += rules.apply(self._rescored(item, more), missing)[0]
        note = {
            "window": len(window), "counts": dict(counts), "found": found, "filled": len(chosen) - found,
            "pos": positives, "neg": [candidate.score for candidate in chosen],
            **self._false_negatives(item, window, positives, twins),
        }  # fmt: skip
        return Mined(item, chosen, positives, note)

    def _candidates(self, hits: Sequence[Hit]) -> list[Candidate]:
        return [Candidate(hit.row, self.store[hit.row], hit.score) for hit in hits]

    def _rescored(self, item: Item, candidates: list[Candidate]) -> list[Candidate]:
        if self.reranker is None:
            return candidates
        scores = self.reranker.score(item.query, [candidate.text for candidate in candidates])
        return [Candidate(c.row, c.text, score) for c, score in zip(candidates, scores, strict=True)]

    def _random(self, generator: Random, missing: int, vector: np.ndarray) -> list[Candidate]:
        assert self.retriever is not None
        rows = self._rows(generator, missing)
        scores = self.retriever.row_scores(rows, vector)
        return [Candidate(row, self.store[row], score) for row, score in zip(rows, scores, strict=True)]

    def _draw(self, item: Item) -> Mined:
        """The random dataset: no model takes part."""
        wanted = self.sampling.negative_number
        drawn = self._rows(self.sampling.generator(item.key), wanted)
        chosen, counts = self._rules(item, 0.0).apply((Candidate(row, self.store[row]) for row in drawn), wanted)
        found = len(chosen)
        note = {"window": found + counts.total(), "counts": dict(counts), "found": found, "filled": 0}
        return Mined(item, chosen, [], {**note, "pos": [], "neg": []})

    def _rows(self, generator: Random, wanted: int) -> list[int]:
        """Places drawn without replacement, several times as many as ``wanted``, since some will be left out."""
        rows = self.store.rows
        return generator.sample(range(rows), min(rows, _RANDOM_TRIES * (wanted + 1)))

    def _rules(self, item: Item, positive: float, twins: Collection[int] = ()) -> NegativeFilter:
        rules = NegativeFilter(item, self.filters, positive)
        rules.twins.update(twins)
        return rules

    def _twins(self, item: Item, candidates: Sequence[Candidate], positives: Sequence[float]) -> set[int]:
        """Places of candidates whose token ids are a positive's; ``positives``: the retriever's scores of those."""
        assert self.retriever is not None
        near = [c for c in candidates if any(abs(c.score - p) <= _SAME_SCORE * max(1.0, abs(p)) for p in positives)]
        if not near:
            return set()
        tokens = self.retriever.passage_tokens([*item.positives, *(candidate.text for candidate in near)])
        count = len(item.positives)
        known = set(tokens[:count])
        return {candidate.row for candidate, own in zip(near, tokens[count:], strict=True) if own in known}

    def _false_negatives(
        self, item: Item, window: Sequence[Candidate], positives: Sequence[float], twins: Collection[int]
    ) -> dict[str, int]:
        """How the score filters alone would do on passages known to be relevant.

        ``judged``: relevant passages in the window; ``judged_pass``: those the filters would let through. ``hidden``
        and ``hidden_pass``: the same for queries of several positives, each in turn taken for unknown, with margins
        from the others. Passages in the window that no judgment knows are of that kind.
        """
        filters, rules = self.filters, self._rules(item, min(positives), twins)
        judged = [c for c in window if rules.reason(c) in ("judged_positive", "same_as_positive")]
        passed = sum(filters.reason(candidate.score, min(positives)) is None for candidate in judged)
        figures = {"judged": len(judged), "judged_pass": passed}
        if len(positives) > 1 and window:
            low, high = min(c.score for c in window), max(c.score for c in window)
            inside = [i for i, score in enumerate(positives) if low <= score <= high]
            others = [min([*positives[:i], *positives[i + 1 :]]) for i in inside]
            passed = sum(filters.reason(positives[i], rest) is None for i, rest in zip(inside, others, strict=True))
            figures |= {"hidden": len(inside), "hidden_pass": passed}
        return figures


def training_row(mined: Mined, with_scores: bool = False) -> dict[str, Any] | None:
    """The row as files have it: query, pos, neg, neg_q where the row had it, scores where asked, other columns.

    Scores that came with the row are dropped: they belonged to other negatives. None where there is no negative.
    """
    item, record, negatives = mined.item, mined.item.record, [candidate.text for candidate in mined.negatives]
    if not negatives:
        return None
    row: dict[str, Any] = {"query": item.query, "pos": item.positives, "neg": negatives}
    if record is not None and record.neg_q is not None:
        queries = realign(record, negatives)
        row["neg_q"] = written(queries)
        mined.note["neg_q"] = [sum(map(bool, record.neg_q)), sum(map(bool, queries)), len(queries)]
    if with_scores:
        row["pos_scores"] = mined.positive_scores
        row["neg_scores"] = [candidate.score for candidate in mined.negatives]
    return {**row, **item.others}
