"""The chart of the reproduced table: every seed a dot, the row's mean a tick, the base model a line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.plots import COLORS, GRAY, INK, NOTE, pyplot, save, tidy
from FlagEmbedding.utils.io import PathLike


def plot_table(
    path: PathLike, rows: dict[str, dict[str, dict[str, list[float]]]], languages: Sequence[str],
    measures: Sequence[Measure], published: dict[str, dict[str, dict[str, float]]],
) -> None:  # fmt: skip
    """One panel per language and measure, rows from top to bottom.

    Args:
        rows: row name -> language -> measure key -> one value (0 to 1) per seed.
        published: row name -> language -> measure key -> the paper's score × 100.
    """
    plt = pyplot()
    names = list(rows)
    figure, axes = plt.subplots(
        len(languages), len(measures), squeeze=False, sharey=True, layout="constrained",
        figsize=(2.2 + 3.4 * len(measures), (0.9 + 0.5 * len(names)) * len(languages) + 0.4),
    )  # fmt: skip
    for line, lang in enumerate(languages):
        for column, measure in enumerate(measures):
            axis = axes[line][column]
            values = {name: [100 * value for value in rows[name][lang][measure.key]] for name in names}
            paper = {name: published.get(name, {}).get(lang, {}).get(measure.key) for name in names}
            _panel(axis, values, paper)
            axis.set_title(f"{lang}: {measure.label}" if len(languages) > 1 else measure.label, fontsize=10, color=INK)
    where = f" ({languages[0]})" if len(languages) == 1 else ""
    figure.get_layout_engine().set(wspace=0.04, hspace=0.05)
    note = f"score × 100{where}; dots: seeds, tick: their mean, dashed: {names[0]}"
    figure.supxlabel(note + ("; diamond: the paper" if published else ""), fontsize=9, color=NOTE)
    save(figure, path)
    plt.close(figure)


def _panel(axis: Any, rows: dict[str, list[float]], paper: dict[str, float | None]) -> None:
    for place, (name, values) in enumerate(rows.items()):
        middle, color = statistics.fmean(values), [GRAY, *COLORS][place % (len(COLORS) + 1)]
        if len(values) > 1:
            axis.plot([min(values), max(values)], [place, place], color=color, linewidth=5, alpha=0.35)
        axis.plot(values, [place] * len(values), "o", color=color, markersize=5.5, alpha=0.9, markeredgewidth=0)
        axis.plot([middle, middle], [place - 0.2, place + 0.2], color=color, linewidth=2.4)
        if paper[name] is not None:
            axis.plot(paper[name], place, "D", markersize=6, markerfacecolor="white", markeredgecolor=INK)
        axis.annotate(
            f"{middle:.1f}", (middle, place - 0.24), ha="center", va="bottom", fontsize=8, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    first = statistics.fmean(next(iter(rows.values())))
    axis.axvline(first, color=GRAY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.85)
    axis.margins(x=0.14)
    tidy(axis, "x")
