"""Measures by name, computed by trec_eval's own code (ir_measures over pytrec_eval).

Every judged query counts: one without results scores 0 in every measure (``trec_eval -c``). One implementation
serves all measures, so they see the same ranking: scores descending, ties by docid descending.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from FlagEmbedding.collections.trec import Qrels, Run, ranking
from FlagEmbedding.utils.errors import DataError, UsageError

# kind -> (label, ir_measures name, needs a cutoff)
_KINDS = {
    "ndcg": ("nDCG", "nDCG", False),
    "recall": ("Recall", "R", True),
    "mrr": ("MRR", "RR", False),
    "map": ("MAP", "AP", False),
    "p": ("P", "P", True),
}
_ALIASES = {
    "ndcg": "ndcg", "ndcg_cut": "ndcg", "recall": "recall", "r": "recall", "mrr": "mrr", "rr": "mrr",
    "recip_rank": "mrr", "map": "map", "ap": "map", "map_cut": "map", "p": "p", "precision": "p",
}  # fmt: skip
_NAME = re.compile(r"([a-z_]+?)(?:[@._](\d+))?$")

PerQuery = dict[str, dict[str, float]]  # measure key -> qid -> value, 0 to 1


@dataclass(frozen=True)
class Measure:
    """A measure and its cutoff (None: the whole ranking)."""

    kind: str
    cutoff: int | None

    @property
    def key(self) -> str:
        """As in published result files: ``ndcg@10``."""
        return self.kind + ("" if self.cutoff is None else f"@{self.cutoff}")

    @property
    def label(self) -> str:
        """As in papers: ``nDCG@10``."""
        return _KINDS[self.kind][0] + ("" if self.cutoff is None else f"@{self.cutoff}")


def parse_measure(text: str) -> Measure:
    """``nDCG@10``, the published ``ndcg@10`` or trec_eval's ``ndcg_cut.10``; nDCG, Recall, MRR, MAP, P.

    Raises ``UsageError`` for another name, a cutoff of 0, and a missing cutoff where the measure needs one.
    """
    found = _NAME.match(text.strip().lower())
    kind = _ALIASES.get(found[1]) if found else None
    if found is None or kind is None:
        raise UsageError(f"--metrics {text}: expected nDCG@k, Recall@k, MRR@k, MAP@k or P@k, such as ndcg@10")
    cutoff = int(found[2]) if found[2] else None
    if cutoff == 0 or (cutoff is None and _KINDS[kind][2]):
        raise UsageError(f"--metrics {text}: a cutoff of 1 or more is missing, such as {kind}@10")
    return Measure(kind, cutoff)


def parse_measures(texts: Sequence[str]) -> list[Measure]:
    """Each named measure once, in order; a word may hold several, separated by commas."""
    names = [name for text in texts for name in text.split(",") if name]
    if not names:
        raise UsageError("--metrics: name at least one measure, such as ndcg@10")
    return list(dict.fromkeys(parse_measure(name) for name in names))


def evaluate(qrels: Qrels, run: Run, measures: Sequence[Measure]) -> PerQuery:
    """Value of every measure for every judged query, by measure key and qid.

    Results for queries without judgments are left out, as in trec_eval. Raises ``DataError`` when no judged query
    has results: qrels and run then belong to different query sets.
    """
    if not qrels.keys() & run.keys():
        judged, found = (", ".join(list(qids)[:3]) for qids in (qrels, run))
        raise DataError(f"no judged query is in the run: qrels have {judged} …, the run has {found} …")
    try:
        import ir_measures
    except ImportError as error:
        raise UsageError("measures need ir_measures and pytrec-eval-terrier: pip install -e '.[eval]'") from error
    # A query missing from the run is scored 0 here, not left to the provider's idea of it.
    values: PerQuery = {measure.key: dict.fromkeys(qrels, 0.0) for measure in measures}
    asked: dict[int | None, dict[Any, str]] = {}  # length the rankings are cut to -> specification -> measure key
    for measure in measures:
        # trec_eval knows no reciprocal rank with a cutoff: it is the plain one of the cut ranking.
        cut = measure.cutoff if measure.kind == "mrr" else None
        kind = getattr(ir_measures, _KINDS[measure.kind][1])
        asked.setdefault(cut, {})[kind if cut == measure.cutoff else kind @ measure.cutoff] = measure.key
    for cut, keys in asked.items():
        part = {qid: {docid: hits[docid] for docid in ranking(hits)[:cut]} for qid, hits in run.items()} if cut else run
        for result in ir_measures.pytrec_eval.evaluator(list(keys), qrels).iter_calc(part):
            values[keys[result.measure]][result.query_id] = float(result.value)
    return values


def mean(values: dict[str, float]) -> float:
    """Mean over queries."""
    return math.fsum(values.values()) / len(values)
