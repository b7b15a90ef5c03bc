"""The report's picture: losses, learning rate, gradient norm, dev curve against the base, router load per layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from FlagEmbedding.evaluation.plots import COLORS, GRAY, INK, pyplot, save, tidy
from FlagEmbedding.finetune.report.summary import term_names

if TYPE_CHECKING:
    from FlagEmbedding.finetune.report.change import Change

_WIDE, _HIGH, _COLUMNS = 4.6, 3.3, 3
_MOST_WRITTEN = 128  # cells of a heatmap in which the share can be read


def plot_run(
    path: Path, history: list[dict[str, Any]], main_key: str, best_step: int | None, change: Change | None = None
) -> bool:
    """Draw one panel for each thing that the log tells; False where it tells nothing.

    Args:
        main_key: log key of the dev measure that decides; empty without dev queries.
        change: between base and what is kept.

    Raises:
        UsageError: matplotlib is not installed.
    """
    plt = pyplot()
    panels = _panels(history, main_key, best_step)
    if change is not None:
        panels += [partial(_margins, change)] if change.before.margins.size else []
        panels.append(partial(_moved, change))
    if not panels:
        return False
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (_WIDE * columns, _HIGH * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(figure, axis)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    save(figure, path)
    plt.close(figure)
    return True


def _panels(history: list[dict[str, Any]], main_key: str, best_step: int | None) -> list[Callable[[Any, Any], None]]:
    lines = [line for line in history if "loss" in line]
    panels: list[Callable[[Any, Any], None]] = []
    dev = [line for line in history if main_key and main_key in line]
    if dev:
        panels.append(partial(_dev_curve, dev, main_key, best_step))
    if lines:
        names = dict.fromkeys(name for line in lines for name in term_names(line))
        panels += [partial(_curve, lines, name) for name in [*names, "learning_rate", "grad_norm"]]
    loads = [line for line in lines if "router_load" in line]
    if loads:
        panels.append(partial(_loads, loads[-1]))
    return panels


def _curve(lines: list[dict[str, Any]], name: str, figure: Any, axis: Any) -> None:
    chosen = [line for line in lines if name in line]
    mark = "o" if len(chosen) == 1 else ""
    axis.plot([line["step"] for line in chosen], [line[name] for line in chosen], marker=mark, color=COLORS[3])
    _finish(axis, name.replace("_", " "))


def _dev_curve(lines: list[dict[str, Any]], key: str, best_step: int | None, figure: Any, axis: Any) -> None:
    measure = key.rpartition("_")[2]
    steps = [line["step"] for line in lines]
    every = [name for name in lines[0] if name.endswith(f"_{measure}")]
    others = [name for name in every if name != key] if len(every) > 2 else []  # one language is the mean itself
    for name, color in zip(others, [*COLORS[:3], *COLORS[4:]] * len(others), strict=False):
        axis.plot(steps, [100 * line.get(name, np.nan) for line in lines], color=color, lw=1, label=_series(name))
    values = [100 * line[key] for line in lines]
    label = _series(key) if others else None
    axis.plot(steps, values, "o-", color=COLORS[3], linewidth=2, markersize=4, label=label)
    axis.axhline(values[0], color=GRAY, linestyle="--", label="base")
    if best_step in steps:
        axis.plot(best_step, values[steps.index(best_step)], "o", markersize=9, mfc="none", mec=COLORS[4], label="best")
    axis.legend(frameon=False, fontsize=8)
    _finish(axis, f"{key.removeprefix('eval_').replace('_', ' ')} of the dev queries (× 100)")


def _series(key: str) -> str:
    """The language in a log key such as ``eval_ko_ndcg@10``; without one it is the mean of all."""
    return key.removeprefix("eval_").removeprefix("pooled_").rpartition("_")[0] or "mean"


def _loads(line: dict[str, Any], figure: Any, axis: Any) -> None:
    """Layers down, experts across, the share of the choices as color."""
    loads = np.array(line["router_load"])
    image = axis.imshow(100 * loads, aspect="auto", cmap="viridis", vmin=0, vmax=100 * max(loads.max(), 1e-9))
    axis.set(xlabel="expert", ylabel="layer", xticks=range(loads.shape[1]), yticks=range(loads.shape[0]))
    axis.set_title(f"router load at step {line['step']} (% of the choices)", fontsize=10, color=INK)
    figure.colorbar(image, ax=axis)
    if loads.size <= _MOST_WRITTEN:
        for (layer, expert), share in np.ndenumerate(loads):
            color = "white" if share < 0.6 * loads.max() else INK
            axis.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


def _margins(change: Change, figure: Any, axis: Any) -> None:
    """How far positives are above their negatives, before and after, in the same bins."""
    both = {"base": (change.before, GRAY), "kept": (change.after, COLORS[3])}
    values = np.concatenate([each.margins.ravel() for each, _ in both.values()])
    bins = np.linspace(values.min(), values.max(), 31) if values.max() > values.min() else 3
    for name, (each, color) in both.items():
        filled = {"histtype": "stepfilled", "alpha": 0.7} if name == "base" else {"histtype": "step", "lw": 2}
        label = f"{name}, median {np.median(each.margins):+.3f}"
        axis.hist(each.margins.ravel(), bins, color=color, label=label, **filled)
    axis.axvline(0, color=INK, linewidth=1)
    axis.locator_params(axis="x", nbins=5)
    axis.set_ylim(top=1.3 * axis.get_ylim()[1])  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(axis, "y")
    axis.set_title(f"positive minus negative, {len(change.before.margins)} training rows", fontsize=10, color=INK)
    axis.set_xlabel("margin", fontsize=9)
    axis.set_ylabel("negatives", fontsize=9)


def _moved(change: Change, figure: Any, axis: Any) -> None:
    parts = change.parts[::-1]
    bars = axis.barh([each.name for each in parts], [100 * each.moved for each in parts], color=COLORS[3], height=0.6)
    axis.bar_label(bars, fmt="%.2g", fontsize=8, padding=2, color=INK)
    axis.set_xlim(0, 1.2 * max(100 * max(each.moved for each in parts), 0.01))
    tidy(axis, "x")
    axis.set_title("how far the weights moved", fontsize=10, color=INK)
    axis.set_xlabel("% of their norm", fontsize=9)


def _finish(axis: Any, title: str) -> None:
    tidy(axis, "y")
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel("step", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
