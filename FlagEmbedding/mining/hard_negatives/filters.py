"""Which candidates of a rank window may serve as negatives, and which of those are taken.

A candidate is left out for the first of ``REASONS`` that holds; margins are measured from the lowest score of the
query's positives, the careful choice. Rules and order of the last four are those of sentence-transformers'
``mine_hard_negatives``; a relative margin of 0.05 with the top of the list is the TopK-PercPos of NV-Retriever (arXiv
2407.15831). The rank window is upstream's: ``2-30`` are places 3 to 30 of the list as searched, positives included.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from FlagEmbedding.mining.common.options import check_least
from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.ranks import parse_range
from FlagEmbedding.utils.texts import text_key, text_keys

if TYPE_CHECKING:  # brings numpy, and with it a slower --help
    from FlagEmbedding.mining.common.queries import Item

REASONS = {
    "judged_positive": "answers the query, by qrels or training rows",
    "same_as_positive": "text (or tokens) of a positive under another id",
    "same_as_query": "text of the query",
    "repeated": "text of a candidate ranked higher",
    "absolute_margin": "score + margin above the positive's",
    "relative_margin": "score above positive − margin · abs(positive)",
    "max_score": "score above the limit",
    "min_score": "score below the limit",
}

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
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


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
    fill: Fill = choice(Fill, "random", "where too few are left: random passages, the ranks below the window, nothing")
    random_negatives: bool = switch(False, "no mining: every negative at random from the corpus")
    seed: int = option(42, "of all choices")

    def __post_init__(self) -> None:
        parse_range(self.range_for_sampling)  # refuses what is no window
        check_least(self, negative_number=1)

    @property
    def window(self) -> tuple[int, int]:
        """(A, B): the window is ranks A + 1 to B."""
        return parse_range(self.range_for_sampling)

    @property
    def depth(self) -> int:
        """Ranks to search for."""
        last = self.window[1]
        return last * 2 + self.negative_number if self.fill == "next" else last

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
        item: the query; its text, its positives and what is judged to answer it may not come back as negatives.
        filters: limits on scores.
        positive: the score that margins are measured from.

    Attributes:
        twins: places in the corpus of passages that the encoder reads as it reads a positive.
    """

    def __init__(self, item: Item, filters: ScoreFilters, positive: float) -> None:
        self._query, self._positives = text_key(item.query), text_keys(item.positives)
        self._judged_rows, self._judged = frozenset(item.positive_rows), item.judged
        self._filters, self._positive, self._seen = filters, positive, set[bytes]()
        self.twins = set[int]()

    def reason(self, candidate: Candidate) -> str | None:
        """Why ``candidate`` is left out, or None."""
        key = text_key(candidate.text)
        if candidate.row in self._judged_rows or key in self._judged:
            return "judged_positive"
        if key in self._positives or candidate.row in self.twins:
            return "same_as_positive"
        if key == self._query:
            return "same_as_query"
        if key in self._seen:
            return "repeated"
        self._seen.add(key)
        return self._filters.reason(candidate.score, self._positive)

    def apply(self, candidates: Iterable[Candidate], most: int | None = None) -> tuple[list[Candidate], Counter[str]]:
        """The first ``most`` candidates that may serve, and how many were left out up to there for each reason."""
        kept, counts = list[Candidate](), Counter[str]()
        for candidate in candidates:
            if len(kept) == most:
                break
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
