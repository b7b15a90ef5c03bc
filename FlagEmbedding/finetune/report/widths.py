"""The report's table of dev measures by width, for runs with ``--matryoshka_dims``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from FlagEmbedding.evaluation.systems import AVERAGE
from FlagEmbedding.evaluation.tables import points
from FlagEmbedding.utils.pages import table

if TYPE_CHECKING:
    from FlagEmbedding.finetune.dev.evaluation import DevEvaluation


def widths_table(dev: DevEvaluation | None) -> str:
    """One line per width: each measure of the base and of what the run left, × 100; empty without widths."""
    if dev is None or len(dev.by_width) < 2:
        return ""
    base, tuned = dev.by_width[0], dev.by_width[-1]
    head = [f"{measure.label}{what}" for measure in dev.measures for what in (", base", "")]
    rows = [
        [
            width,
            *(points(systems[width].mean(AVERAGE, measure)) for measure in dev.measures for systems in (base, tuned)),
        ]
        for width in tuned
    ]
    return table(["dimensions", *head], rows, range(len(head) + 1))
