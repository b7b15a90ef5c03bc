"""Which candidates of a rank window may serve as negatives, and which of those are taken.

A candidate is left out for the first of these reasons that holds:

    judged_positive     qrels, or the training rows, say that it answers the query
    same_as_positive    its text is that of a positive
    same_as_query       its text is that of the query
    repeated            its text is that of a candidate ranked higher
    absolute_margin     score + margin > positive
    relative_margin     score > positive − margin · |positive|
    max_score           score > limit
    min_score           score < limit

``positive`` is the lowest score of the query's positives, the careful choice. Rules and order of the last four are
those of sentence-transformers' ``mine_hard_negatives``; a relative margin of 0.05 with the top of the list is the
TopK-PercPos of NV-Retriever (arXiv 2407.15831). The rank window is upstream's: ``2-30`` are places 3 to 30 of the
list as searched, positives included.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.utils.errors import UsageError

REASONS = (
    "judged_positive", "same_as_positive", "same_as_query", "repeated",
    "absolute_margin", "relative_margin", "max_score", "min_score",
)  # fmt: skip
BY_SCORE = REASONS[4:]


@dataclass(frozen=True)
class ScoreFilters:
    """Limits on a candidate's score, absolute or against the positive's; None switches one off."""

    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None

    def reason(self, score: float, positive: float) -> str | None:
        """Why a candidate of ``score`` is left out, or None."""
        if self.absolute_margin is not None and score + self.absolute_margin > positive:
            return "absolute_margin"
        if self.relative_margin is not None and score > positive - abs(positive) * self.relative_margin:
            return "relative_margin"
        if self.max_score is not None and score > self.max_score:
            return "max_score"
        if self.min_score is not None and score < self.min_score:
            return "min_score"
        return None

    def given(self) -> list[str]:
        """Names of the limits that are on."""
        return [name for name in BY_SCORE if getattr(self, name) is not None]


@dataclass(frozen=True)
class Sampling:
    """How negatives are taken.

    Attributes:
        first, last: the window: ranks ``first`` + 1 to ``last``.
        negatives: how many a query gets.
        strategy: at random out of what is left of the window, or its top.
        fill: what makes up for missing ones: ``random`` passages of the corpus (as upstream), the ``next`` ranks below
            the window, or ``none``. Both pass the same filters.
        seed: of all choices; each query has its own stream, so its negatives do not depend on other queries.
        filters: limits on scores.
    """

    first: int = 10
    last: int = 210
    negatives: int = 15
    strategy: Literal["random", "top"] = "random"
    fill: Literal["random", "next", "none"] = "random"
    seed: int = 42
    filters: ScoreFilters = ScoreFilters()

    @property
    def depth(self) -> int:
        """Ranks to search for."""
        return self.last * 2 + self.negatives if self.fill == "next" else self.last

    def generator(self, key: str) -> random.Random:
        """The stream of one query. Seeding by text goes through SHA-512, the same everywhere."""
        return random.Random(f"{self.seed}/{key}")


def parse_range(text: str) -> tuple[int, int]:
    """``2-30`` as (2, 30). Raises ``UsageError``."""
    first, _, last = text.partition("-")
    if not (first.strip().isdigit() and last.strip().isdigit()) or int(first) >= int(last):
        raise UsageError(f"range_for_sampling {text!r}: give two ranks such as 2-30, the first below the second")
    return int(first), int(last)


@dataclass(frozen=True)
class Candidate:
    """A passage that was found: ``row`` in the corpus, its text, its score."""

    row: int
    text: str
    score: float = 0.0


class Sieve:
    """Applies the rules for one query; a text that came once is remembered, however it was found.

    Args:
        query, positives: their texts may not come back as negatives.
        judged_rows: rows of the corpus that answer the query.
        judged: keys of texts that answer it, where there are no docids to go by.
        filters: limits on scores.
        positive: the score that margins are measured from.
    """

    def __init__(
        self, query: str, positives: Sequence[str], judged_rows: Sequence[int], judged: Collection[bytes],
        filters: ScoreFilters, positive: float,
    ) -> None:  # fmt: skip
        self._query = text_key(query)
        self._positives = {text_key(text) for text in positives}
        self._judged_rows, self._judged = frozenset(judged_rows), judged
        self._filters, self._positive = filters, positive
        self._seen: set[bytes] = set()

    def reason(self, candidate: Candidate) -> str | None:
        """Why ``candidate`` is left out, or None."""
        key = text_key(candidate.text)
        if candidate.row in self._judged_rows or key in self._judged:
            return "judged_positive"
        if key in self._positives:
            return "same_as_positive"
        if key == self._query:
            return "same_as_query"
        if key in self._seen:
            return "repeated"
        self._seen.add(key)
        return self._filters.reason(candidate.score, self._positive)

    def sift(self, candidates: Iterable[Candidate]) -> tuple[list[Candidate], Counter[str]]:
        """The candidates that may serve, in order, and how many were left out for each reason."""
        kept, counts = [], Counter[str]()
        for candidate in candidates:
            reason = self.reason(candidate)
            if reason is None:
                kept.append(candidate)
            else:
                counts[reason] += 1
        return kept, counts


def choose(kept: Sequence[Candidate], sampling: Sampling, generator: random.Random) -> list[Candidate]:
    """The negatives out of what is left of a window, in order of rank."""
    if len(kept) <= sampling.negatives:
        return list(kept)
    if sampling.strategy == "top":
        return list(kept[: sampling.negatives])
    return [kept[i] for i in sorted(generator.sample(range(len(kept)), sampling.negatives))]
