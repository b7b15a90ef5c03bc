"""What happens to a negative passage that answers another query, without and with the penalty.

Nothing here is sketched: four unit vectors in the plane go down the gradient of this package's own losses, and the
picture shows where they went.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from style import BLUE, FAINT, GREEN, INK, LINE, ORANGE, RED, save
from torch import Tensor

from FlagEmbedding.losses.contrastive import dense_scores, info_nce
from FlagEmbedding.losses.penalty import apply_penalty, clp_penalty

QUERY, POSITIVE, NEGATIVE, OTHER = range(4)
START = (90.0, 125.0, 75.0, 85.0)  # degrees: q, p+, p−, h*
STEPS, RATE, TEMPERATURE, WEIGHT = 1000, 0.01, 0.05, 0.1
LABELS = {QUERY: r"$q$", POSITIVE: r"$p^{+}$", NEGATIVE: r"$p^{-}$", OTHER: r"$h^{*}$"}
COLOURS = {QUERY: BLUE, POSITIVE: GREEN, NEGATIVE: RED, OTHER: ORANGE}


def descend(weight: float) -> np.ndarray:
    """Angles in degrees ``[STEPS + 1, 4]`` along plain gradient descent; ``weight`` is λ."""
    angles = torch.tensor([math.radians(x) for x in START], dtype=torch.float64, requires_grad=True)
    path = []
    for _ in range(STEPS + 1):
        path.append([math.degrees(x) for x in angles.tolist()])
        vectors = torch.stack([angles.cos(), angles.sin()], dim=-1)
        (gradient,) = torch.autograd.grad(_loss(vectors, weight), angles)
        angles = (angles - RATE * gradient).detach().requires_grad_()
    return np.array(path)


def _loss(vectors: Tensor, weight: float) -> Tensor:
    passages = vectors[[POSITIVE, NEGATIVE]]
    loss = info_nce(dense_scores(vectors[[QUERY]], passages, TEMPERATURE), group_size=2)
    if weight:
        loss = apply_penalty(loss, clp_penalty(passages, vectors[[OTHER]], torch.tensor([1])), weight)
    return loss


def draw() -> Path:
    """Draw ``imgs/contrastive_vs_clp.png``."""
    figure = plt.figure(figsize=(14, 6.4))
    figure.text(0.03, 0.95, "A negative passage that answers another query", size=17, weight="bold", va="center")
    figure.text(
        0.03, 0.893,
        "Embeddings on the unit circle, moved by gradient descent on the two losses (hollow: before, filled: after).",
        size=11.5, color=FAINT, va="center",
    )  # fmt: skip
    without, with_penalty = descend(0.0), descend(WEIGHT)
    panels = (
        (0.02, without, "Contrastive loss", "and tears it from its own query $h^{*}$"),
        (0.355, with_penalty, "Contrastive loss + CLP", "but $p^{-}$ and $h^{*}$ stay together"),
    )
    for left, path, title, text in panels:
        _circle(figure.add_axes((left, 0.09, 0.325, 0.75)), path, title, f"pushes $p^{{-}}$ away from $q$,\n{text}")
    _curves(figure.add_axes((0.735, 0.225, 0.235, 0.53)), without, with_penalty)
    _key(figure)
    return save(figure, "contrastive_vs_clp")


def _circle(axes: Axes, path: np.ndarray, title: str, text: str) -> None:
    axes.set(xlim=(-0.88, 0.88), ylim=(-0.36, 1.4), aspect="equal")
    axes.axis("off")
    axes.text(0, 1.38, title, size=14.5, weight="bold", ha="center", va="top")
    sweep = np.radians(np.linspace(32, 148, 200))
    axes.plot(np.cos(sweep), np.sin(sweep), color=LINE, linewidth=2, zorder=1)
    first, last = path[0], path[-1]
    labels = {**_apart(last, QUERY, POSITIVE), **_apart(last, NEGATIVE, OTHER)}
    for point in (QUERY, POSITIVE, NEGATIVE, OTHER):
        colour = COLOURS[point]
        axes.plot(*_at(first[point]), "o", ms=10, mfc="white", mec=colour, mew=2, zorder=3)
        axes.plot([0, _at(last[point])[0]], [0, _at(last[point])[1]], color=colour, linewidth=1.6, alpha=0.75, zorder=2)
        axes.plot(*_at(last[point]), "o", ms=12, color=colour, zorder=4)
        axes.text(*_at(labels[point], 1.12), LABELS[point], size=20, color=colour, ha="center", va="center")
        if abs(last[point] - first[point]) > 4:
            _arc(axes, first[point], last[point], colour)
    _angle(axes, last[NEGATIVE], last[OTHER])
    axes.text(0.0, -0.22, text, size=12.5, ha="center", va="center", color=INK, linespacing=1.35)


def _apart(last: np.ndarray, one: int, other: int, degrees: float = 9.0) -> dict[int, float]:
    """Where to write the labels of two points that may lie side by side: at least so many degrees from each other."""
    middle, half = (last[one] + last[other]) / 2, max(degrees, abs(last[one] - last[other])) / 2
    right, left = (one, other) if last[one] < last[other] else (other, one)
    return {right: middle - half, left: middle + half}


def _at(degrees: float, radius: float = 1.0) -> tuple[float, float]:
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def _arc(axes: Axes, start: float, end: float, colour: str) -> None:
    """An arrow just inside the circle, from before to after."""
    bend = math.tan(math.radians(end - start) / 4)
    arrow = FancyArrowPatch(
        _at(start, 0.925), _at(end, 0.925), connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=15,
        color=colour, linewidth=1.8, shrinkA=2, shrinkB=2, zorder=5,
    )  # fmt: skip
    axes.add_patch(arrow)


def _angle(axes: Axes, negative: float, other: float) -> None:
    """The angle between the negative and its own query, near the centre, with its cosine."""
    sweep = np.radians(np.linspace(negative, other, 40))
    axes.plot(0.5 * np.cos(sweep), 0.5 * np.sin(sweep), color=INK, linewidth=1.6)
    cosine = math.cos(math.radians(other - negative))
    anchor = _at((negative + other) / 2, 0.5)
    axes.annotate(
        rf"$\cos(h^{{*}},p^{{-}})={cosine:.3f}$", anchor, (0.25, 0.2), size=14, va="center",
        arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 1},
    )  # fmt: skip


def _curves(axes: Axes, without: np.ndarray, with_penalty: np.ndarray) -> None:
    for path, style, name in ((without, "--", "contrastive"), (with_penalty, "-", "with CLP")):
        for partner, colour in ((OTHER, ORANGE), (QUERY, BLUE)):
            cosine = np.cos(np.radians(path[:, NEGATIVE] - path[:, partner]))
            axes.plot(cosine, style, color=colour, linewidth=2.2, label=name if partner == OTHER else None)
    axes.set(xlim=(0, STEPS), ylim=(0.44, 1.02), xlabel="gradient steps")
    axes.set_title("Cosine of the negative $p^{-}$ to …", size=12.5, loc="left", pad=12)
    axes.text(STEPS * 0.98, 0.865, r"… its own query $h^{*}$", color=ORANGE, size=13, ha="right")
    axes.text(STEPS * 0.98, 0.715, r"… the query $q$", color=BLUE, size=13, ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    handles = [plt.Line2D([], [], color=INK, linestyle=style, linewidth=2.2) for style in ("--", "-")]
    axes.legend(handles, ["contrastive loss", "with CLP"], loc="lower right", frameon=False, fontsize=11.5)


def _key(figure: plt.Figure) -> None:
    entries = ((QUERY, "the query"), (POSITIVE, "its positive"), (NEGATIVE, "its negative"))
    for x, (point, meaning) in zip((0.03, 0.125, 0.23), entries, strict=True):
        _entry(figure, x, point, meaning)
    _entry(figure, 0.345, OTHER, "a query that $p^{-}$ answers")
    knobs = rf"$\tau={TEMPERATURE}$, $\lambda={WEIGHT}$"
    figure.text(0.97, 0.045, knobs, size=13, color=FAINT, ha="right", va="center")


def _entry(figure: plt.Figure, x: float, point: int, meaning: str) -> None:
    figure.text(x, 0.045, LABELS[point], size=17, color=COLOURS[point], va="center")
    figure.text(x + (0.017 if point == QUERY else 0.025), 0.045, meaning, size=11.5, va="center")
