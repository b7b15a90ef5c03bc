"""What a comparison is made of: systems with their scores, and the tests between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from FlagEmbedding.evaluation.metrics import Measure, PerQuery, mean

AVERAGE = "average"


@dataclass(frozen=True)
class LanguageScores:
    """One system on one language's queries.

    Attributes:
        values: measure key -> qid -> value (0 to 1), the same qids for every measure and system.
        first_relevant: qid -> rank of the first relevant passage, None where none was found.
        top: qid -> docid of the first hit, None where there is no hit.
    """

    values: PerQuery
    first_relevant: dict[str, int | None]
    top: dict[str, str | None]


@dataclass(frozen=True)
class System:
    """A model or run with its scores on every language."""

    name: str
    languages: dict[str, LanguageScores]

    @property
    def shown(self) -> list[str]:
        """The languages, and where there are several their ``average``: the lines of a table."""
        return [*self.languages, AVERAGE] if len(self.languages) > 1 else list(self.languages)

    def mean(self, lang: str, measure: Measure) -> float:
        """Mean of a language, or for ``average`` the mean of the languages' means."""
        if lang == AVERAGE:
            return float(np.mean([self.mean(each, measure) for each in self.languages]))
        return mean(self.languages[lang].values[measure.key])


@dataclass(frozen=True)
class Comparison:
    """One test: ``system`` minus ``baseline`` on one language (or ``average``) and one measure, values 0 to 1."""

    baseline: str
    system: str
    language: str
    measure: str
    queries: int
    baseline_mean: float
    system_mean: float
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    better: int
    worse: int
    equal: int
