"""Charts: scores side by side, and the differences with their intervals below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, System
from FlagEmbedding.evaluation.tables import shorten, signed_points
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import PathLike, atomic_open

GREY, INK = "#a9b4c0", "#26323e"
_GROUP = 0.8  # width of a language's group of bars; groups stand 1 apart
# Told apart with any colour vision (Okabe and Ito).
COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#8a6d3b"]


def plot_comparison(
    path: PathLike, systems: Sequence[System], measures: Sequence[Measure], comparisons: Sequence[Comparison]
) -> None:
    """Above: bars a language, one panel a measure. Below: differences to the first system with 95 % intervals."""
    plt = pyplot()
    languages = list(systems[0].languages)
    rows = [*languages, AVERAGE] if len(languages) > 1 else languages
    width = max(6.4, max(2.9, 0.5 + 0.42 * len(rows) * len(systems)) * len(measures))
    figure, axes = plt.subplots(
        2, len(measures), figsize=(min(24.0, width), 6.2), squeeze=False, sharex="col", sharey="row",
        gridspec_kw={"height_ratios": [3, 2]}, layout="constrained",
    )  # fmt: skip
    colours = [GREY, *(COLOURS[place % len(COLOURS)] for place in range(len(systems) - 1))]
    for column, measure in enumerate(measures):
        _bars(axes[0][column], systems, rows, measure, colours)
        _intervals(axes[1][column], systems, rows, measure, comparisons, colours)
    axes[0][0].set_ylabel("score × 100")
    axes[1][0].set_ylabel(f"difference to\n{shorten(systems[0].name, 28)} (× 100)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(systems), 4), frameon=False)
    figure.supxlabel(
        "whiskers: 95 % bootstrap interval of the paired difference; filled: p < 0.05 after Holm's correction",
        fontsize=8, color="#5b6875",
    )  # fmt: skip
    save(figure, path)
    plt.close(figure)


def _bars(axis: Any, systems: Sequence[System], rows: Sequence[str], measure: Measure, colours: Sequence[str]) -> None:
    step = _GROUP / len(systems)
    for place, system in enumerate(systems):
        values = [100 * system.mean(lang, measure) for lang in rows]
        where = [x - _GROUP / 2 + step * (place + 0.5) for x in range(len(rows))]
        bars = axis.bar(where, values, step * 0.94, color=colours[place], label=shorten(system.name, 40))
        if len(systems) * len(rows) <= 16:
            axis.bar_label(bars, fmt="%.0f" if len(rows) > 3 else "%.1f", fontsize=8, padding=1, color=INK)
    axis.set_title(measure.label, fontsize=11)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    tidy(axis)
    _set_average_apart(axis, rows)


def _intervals(
    axis: Any,
    systems: Sequence[System],
    rows: Sequence[str],
    measure: Measure,
    comparisons: Sequence[Comparison],
    colours: Sequence[str],
) -> None:
    axis.axhline(0, color=GREY, linewidth=1.2)
    others = systems[1:]
    step = _GROUP / len(others)
    for place, system in enumerate(others):
        for x, lang in enumerate(rows):
            found = _find(comparisons, systems[0].name, system.name, lang, measure)
            if found is None:
                continue
            at, value = x - _GROUP / 2 + step * (place + 0.5), 100 * found.difference
            colour = colours[place + 1]
            ends = [100 * found.low, 100 * found.high]
            axis.plot([at, at], ends, color=colour, linewidth=2.2, solid_capstyle="round")
            filled = colour if found.p_holm < 0.05 else "white"
            axis.plot(at, value, "o", markersize=6.5, mfc=filled, mec=colour, mew=1.6)
            if len(others) == 1 and len(rows) <= 8:
                axis.annotate(
                    signed_points(found.difference), (at, value), xytext=(7, 0), textcoords="offset points",
                    fontsize=8, va="center", color=INK,
                )  # fmt: skip
    axis.set_xticks(range(len(rows)), rows)
    margin = 0.3 if len(rows) == 1 else 0.0  # two bars should not fill a panel
    axis.set_xlim(-0.6 - margin, len(rows) - 0.4 + margin)
    tidy(axis)
    _set_average_apart(axis, rows)


def _find(
    comparisons: Sequence[Comparison], baseline: str, system: str, lang: str, measure: Measure
) -> Comparison | None:
    for each in comparisons:
        if (each.baseline, each.system, each.language, each.measure) == (baseline, system, lang, measure.key):
            return each
    return None


def _set_average_apart(axis: Any, rows: Sequence[str]) -> None:
    if rows[-1] == AVERAGE:
        axis.axvline(len(rows) - 1.5, color="#d7dde3", linewidth=1)


def tidy(axis: Any) -> None:
    """Horizontal grid behind the data, no box."""
    axis.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, colors=INK, labelsize=9)


def pyplot() -> Any:
    """matplotlib without a display. Raises ``UsageError`` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("charts need matplotlib: pip install -e '.[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: PathLike) -> None:
    """Write a PNG; without the date that would make equal charts differ."""
    with atomic_open(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
