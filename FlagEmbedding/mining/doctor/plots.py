"""The doctor's pictures: cosines and margins, and lengths against their limits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.mining.doctor.scan import ROLES
from FlagEmbedding.mining.doctor.scores import Scores
from FlagEmbedding.utils.errors import UsageError

# Colors that stay apart for color-blind readers (Okabe and Ito).
_COLORS = {"query": "#0072B2", "pos": "#009E73", "neg": "#D55E00", "neg_q": "#CC79A7"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("the report's pictures need matplotlib: pip install 'FlagEmbedding[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_scores(scores: Scores, path: Path) -> None:
    """Left: cosines of positives and negatives to their query. Right: margins, those below zero set apart."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, histogram in (("pos", scores.positive), ("neg", scores.negative)):
        edges, counts = histogram.coarse()
        left.stairs(100 * counts / counts.sum(), edges, fill=True, alpha=0.45, color=_COLORS[name], label=ROLES[name])
    left.set(xlabel="cosine to the query", ylabel="share (%)", title="Positives and negatives")
    left.legend(frameon=False)
    edges, counts = scores.margin.coarse()
    middles = (edges[:-1] + edges[1:]) / 2
    colors = [_COLORS["neg"] if middle < 0 else _COLORS["pos"] for middle in middles]
    right.bar(middles, 100 * counts / counts.sum(), width=np.diff(edges), color=colors, alpha=0.75)
    right.axvline(0, color="black", linewidth=0.8)
    below = 100 * scores.margin.below_zero / scores.margin.count
    right.set(
        xlabel="lowest positive − negative (cosine)", ylabel="share of negatives (%)",
        title=f"Margins: {below:.1f} % of the negatives lie above the positive",
    )  # fmt: skip
    _save(pyplot, figure, path)


def plot_lengths(found: dict[str, Counter[int]], unit: str, limits: dict[str, int], path: Path) -> None:
    """Share of texts of up to so many tokens, a curve a role; the limits as lines."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    for role, counts in found.items():
        if counts:
            sizes = np.array(sorted(counts))
            shares = 100 * np.cumsum([counts[size] for size in sizes.tolist()]) / counts.total()
            axes.step(sizes, shares, where="post", color=_COLORS[role], label=ROLES[role])
    for name, limit in limits.items():
        axes.axvline(limit, color="black", linestyle="--", linewidth=0.8)
        # At the foot of the line, since the curves end at the top.
        axes.annotate(f"{name} {limit}", (limit, 3), rotation=90, ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel=f"{unit} (log scale)", ylabel="share of texts up to this length (%)", title="Lengths", ylim=(0, 102)
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
