"""Charts: scores side by side, and the differences with their intervals below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from FlagEmbedding.evaluation.metrics import Measure
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, System
from FlagEmbedding.evaluation.tables import shorten, signed_points
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import PathLike, atomic_open

GRAY, INK, NOTE = "#a9b4c0", "#26323e", "#5b6875"
_GROUP = 0.8  # width of a language's group of bars; groups stand 1 apart
# Told apart with any color vision (Okabe and Ito).
COLORS = ["#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#8a6d3b"]


def plot_comparison(
    path: PathLike, systems: Sequence[System], measures: Sequence[Measure], comparisons: Sequence[Comparison]
) -> None:
    """Above: bars per language, one panel per measure. Below: differences to the first system, 95 % intervals."""
    plt = pyplot()
    width = max(6.4, max(2.9, 0.5 + 0.42 * len(systems[0].shown) * len(systems)) * len(measures))
    figure, axes = plt.subplots(
        2, len(measures), figsize=(min(24.0, width), 6.2), squeeze=False, sharex="col", sharey="row",
        gridspec_kw={"height_ratios": [3, 2]}, layout="constrained",
    )  # fmt: skip
    colors = [GRAY, *(COLORS[place % len(COLORS)] for place in range(len(systems) - 1))]
    for column, measure in enumerate(measures):
        _bars(axes[0][column], systems, measure, colors)
        _intervals(axes[1][column], systems, [c for c in comparisons if c.measure == measure.key], colors)
    axes[0][0].set_ylabel("score × 100")
    axes[1][0].set_ylabel(f"difference to\n{shorten(systems[0].name, 28)} (× 100)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(systems), 4), frameon=False)
    note = "whiskers: 95 % bootstrap interval of the paired difference; filled: p < 0.05 after Holm's correction"
    figure.supxlabel(note, fontsize=8, color=NOTE)
    save(figure, path)
    plt.close(figure)


def _bars(axis: Any, systems: Sequence[System], measure: Measure, colors: Sequence[str]) -> None:
    languages, step = systems[0].shown, _GROUP / len(systems)
    for place, system in enumerate(systems):
        values = [100 * system.mean(lang, measure) for lang in languages]
        where = [x - _GROUP / 2 + step * (place + 0.5) for x in range(len(languages))]
        bars = axis.bar(where, values, step * 0.94, color=colors[place], label=shorten(system.name, 40))
        if len(systems) * len(languages) <= 16:
            axis.bar_label(bars, fmt="%.0f" if len(languages) > 3 else "%.1f", fontsize=8, padding=1, color=INK)
    axis.set_title(measure.label, fontsize=11)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    _finish(axis, languages)


def _intervals(axis: Any, systems: Sequence[System], tests: Sequence[Comparison], colors: Sequence[str]) -> None:
    """The tests of one measure against the first system."""
    axis.axhline(0, color=GRAY, linewidth=1.2)
    languages, others = systems[0].shown, [system.name for system in systems[1:]]
    step = _GROUP / len(others)
    for test in tests:
        if test.baseline != systems[0].name:
            continue
        place = others.index(test.system)
        at = languages.index(test.language) - _GROUP / 2 + step * (place + 0.5)
        color, value = colors[place + 1], 100 * test.difference
        axis.plot([at, at], [100 * test.low, 100 * test.high], color=color, linewidth=2.2, solid_capstyle="round")
        filled = color if test.p_holm < 0.05 else "white"
        axis.plot(at, value, "o", markersize=6.5, mfc=filled, mec=color, mew=1.6)
        if len(others) == 1 and len(languages) <= 8:
            axis.annotate(
                signed_points(test.difference), (at, value), xytext=(7, 0), textcoords="offset points",
                fontsize=8, va="center", color=INK,
            )  # fmt: skip
    axis.set_xticks(range(len(languages)), languages)
    margin = 0.3 if len(languages) == 1 else 0.0  # two bars should not fill a panel
    axis.set_xlim(-0.6 - margin, len(languages) - 0.4 + margin)
    _finish(axis, languages)


def _finish(axis: Any, languages: Sequence[str]) -> None:
    tidy(axis, "y")
    if languages[-1] == AVERAGE:
        axis.axvline(len(languages) - 1.5, color="#d7dde3", linewidth=1)


def tidy(axis: Any, direction: str) -> None:
    """A grid across ``direction`` (x or y) behind the data, no box."""
    axis.grid(axis=direction, color="#e6eaee", linewidth=0.8)
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
