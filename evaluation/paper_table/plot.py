"""The chart of the reproduced table: every seed a dot, the row's mean a tick, the base model a line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.plots import COLOURS, GREY, INK, pyplot, save
from FlagEmbedding.utils.io import PathLike


def plot_table(
    path: PathLike,
    rows: dict[str, dict[str, dict[str, list[float]]]],
    languages: Sequence[str],
    measures: Sequence[Measure],
    published: dict[str, dict[str, dict[str, float]]],
) -> None:
    """One panel a language and measure, rows from top to bottom.

    :param rows: row name -> language -> measure key -> one value (0 to 1) a seed.
    :param published: row name -> language -> measure key -> the paper's score × 100.
    """
    plt = pyplot()
    names = list(rows)
    figure, axes = plt.subplots(
        len(languages), len(measures), squeeze=False, sharey=True, layout="constrained",
        figsize=(2.2 + 3.4 * len(measures), (0.9 + 0.5 * len(names)) * len(languages) + 0.4),
    )  # fmt: skip
    colours = [GREY, *COLOURS]
    for line, lang in enumerate(languages):
        for column, measure in enumerate(measures):
            axis = axes[line][column]
            for place, name in enumerate(names):
                values = [100 * value for value in rows[name][lang][measure.key]]
                middle, colour = statistics.fmean(values), colours[place % len(colours)]
                if len(values) > 1:
                    axis.plot([min(values), max(values)], [place, place], color=colour, linewidth=5, alpha=0.35)
                axis.plot(
                    values, [place] * len(values), "o", color=colour, markersize=5.5, alpha=0.9, markeredgewidth=0
                )
                axis.plot([middle, middle], [place - 0.2, place + 0.2], color=colour, linewidth=2.4)
                there = published.get(name, {}).get(lang, {}).get(measure.key)
                if there is not None:
                    axis.plot(there, place, "D", markersize=6, markerfacecolor="white", markeredgecolor=INK)
                axis.annotate(
                    f"{middle:.1f}",
                    (middle, place - 0.24),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )
            first = statistics.fmean(rows[names[0]][lang][measure.key])
            axis.axvline(100 * first, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            axis.set_title(f"{lang}: {measure.label}" if len(languages) > 1 else measure.label, fontsize=10, color=INK)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.85)
            axis.margins(x=0.14)
            axis.grid(axis="x", color="#e6eaee", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(length=0, colors=INK, labelsize=9)
    where = f" ({languages[0]})" if len(languages) == 1 else ""
    figure.get_layout_engine().set(wspace=0.04, hspace=0.05)
    note = f"score × 100{where}; dots: seeds, tick: their mean, dashed: {names[0]}"
    figure.supxlabel(note + ("; diamond: the paper" if published else ""), fontsize=9, color="#5b6875")
    save(figure, path)
    plt.close(figure)
