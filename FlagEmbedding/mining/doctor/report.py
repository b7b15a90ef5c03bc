"""The doctor's page: what is wrong and what to do, then the figures behind it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.mining.doctor.scan import FINDINGS, ROLES
from FlagEmbedding.mining.doctor.scores import QUANTILES
from FlagEmbedding.utils.pages import of, render

_TERMS = {
    "positive": "cosine of positives", "negative": "cosine of negatives",
    "margin": "lowest positive − negative", "penalty": "1 − cosine of a negative and its neg_q",
}  # fmt: skip
_PAGE = Path(__file__).with_name("report.md.j2")
_SCORE_FIGURES = ("mean", *QUANTILES)
_QUANTILES = {"50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}


def length_figures(found: dict[str, Counter[int]], limits: dict[str, int]) -> dict[str, Any]:
    """Quantiles and the share beyond the limit, by role."""
    figures = {}
    for role, counter in found.items():
        if not counter:
            continue
        sizes, counts = np.array(sorted(counter.items())).T
        total, limit = int(counts.sum()), limits.get("query_max_len" if role == "query" else "passage_max_len")
        places = np.searchsorted(np.cumsum(counts), [share * total for share in _QUANTILES.values()])
        figures[role] = {
            "texts": total, "mean": round(int(sizes @ counts) / total, 1),
            **dict(zip(_QUANTILES, sizes[places].tolist(), strict=True)),
            "limit": limit, "over": 0 if limit is None else int(counts[sizes > limit].sum()),
        }  # fmt: skip
    return figures


def markdown(record: dict[str, Any]) -> str:
    """The record as a page."""
    files = [
        [path, c["rows"], c["positives"], c["negatives"],
         *(of(c[key], c["negatives"]) for key in ("with_query", "known_answers")), c["with_scores"]]
        for path, c in record["files"].items()
    ]  # fmt: skip
    scores = record["scores"] or {}
    terms = [
        [term, scores[name]["count"], *(f"{scores[name][key]:.3f}" for key in _SCORE_FIGURES)]
        for name, term in _TERMS.items()
        if scores and scores[name]["count"]
    ]
    lengths = [
        [ROLES[role], f["texts"], f["mean"], *(f[key] for key in _QUANTILES),
         *((f["limit"], of(f["over"], f["texts"])) if f["limit"] is not None else ("–", "–"))]
        for role, f in record["lengths"].items()
    ]  # fmt: skip
    return render(
        _PAGE, record=record, settings=record["settings"], findings=record["findings"], meanings=FINDINGS, roles=ROLES,
        files=files, scores=scores, score_figures=_SCORE_FIGURES, terms=terms, lengths=lengths,
    )  # fmt: skip
