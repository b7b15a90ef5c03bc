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
from FlagEmbedding.mining.common.options import check_least
from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.ranks import parse_range

REASONS = (
    "judged_positive", "same_as_positive", "same_as_query", "repeated",
    "absolute_margin", "relative_margin", "max_score", "min_score",
)  # fmt: skip
BY_SCORE = REASONS[4:]


Strategy = Literal["random", "top"]
Fill = Literal["random", "next", "none"]


@dataclass(frozen=True)
class ScoreFilters:
    """Filters (as sentence-transformers' mine_hard_negatives).

    Limits on a candidate's score, absolute or against the positive's; None switches one off.
    """

    absolute_margin: float | None = option(None, "leave out what scores within this of the query's lowest positive")
    relative_margin: float | None = option(
        None, "the same, as a share of the positive's score: 0.05 keeps the rest below 95 %%"
    )
    max_score: float | None = option(None, "leave out what scores above this")
    min_score: float | None = option(None, "leave out what scores below this")

    def __post_init__(self) -> None:
        for name in ("absolute_margin", "relative_margin"):
            if (getattr(self, name) or 0.0) < 0:
                raise UsageError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.max_score is not None and self.min_score is not None and self.max_score < self.min_score:
            raise UsageError(
                f"--max_score {self.max_score} is below --min_score {self.min_score}: nothing would be left"
            )

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
    """Which negatives.

    ``fill`` makes up for missing ones by ``random`` passages of the corpus (as upstream), or by the ``next`` ranks
    below the window; both pass the same filters. Each query has its own stream of ``seed``, so that its negatives do
    not depend on other queries.
    """

    range_for_sampling: str = option("10-210", "ranks A+1 to B of the search", metavar="A-B")
    negative_number: int = option(15, "negatives per query")
    sampling_strategy: Strategy = choice(Strategy, "random", "which of those in the window")
    fill: Fill = choice(
        Fill, "random", "where too few are left: random passages of the corpus, the ranks below the window, or nothing"
    )
    random_negatives: bool = switch(False, "no mining: every negative at random from the corpus")
    seed: int = option(42, "of all choices")

    def __post_init__(self) -> None:
        parse_range(self.range_for_sampling)
        check_least(self, negative_number=1)

    @property
    def first(self) -> int:
        """The window is ranks ``first`` + 1 …"""
        return parse_range(self.range_for_sampling)[0]

    @property
    def last(self) -> int:
        """… to ``last``."""
        return parse_range(self.range_for_sampling)[1]

    @property
    def depth(self) -> int:
        """Ranks to search for."""
        return self.last * 2 + self.negative_number if self.fill == "next" else self.last

    def generator(self, key: str) -> random.Random:
        """The stream of one query. Seeding by text goes through SHA-512, the same everywhere."""
        return random.Random(f"{self.seed}/{key}")


@dataclass(frozen=True)
class Candidate:
    """A passage that was found: its place in the corpus (``row``), its text, its score."""

    row: int
    text: str
    score: float = 0.0


class NegativeFilter:
    """The rules for one query; a text that came once is remembered, however it was found.

    Args:
        query, positives: their texts may not come back as negatives.
        judged_rows: places in the corpus that answer the query.
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

    def apply(self, candidates: Iterable[Candidate]) -> tuple[list[Candidate], Counter[str]]:
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
    if len(kept) <= sampling.negative_number:
        return list(kept)
    if sampling.sampling_strategy == "top":
        return list(kept[: sampling.negative_number])
    return [kept[i] for i in sorted(generator.sample(range(len(kept)), sampling.negative_number))]
