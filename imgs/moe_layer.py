"""The expert layer: where it sits in the encoder, and what it does to one token."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from style import BLUE, FAINT, GREEN, INK, LINE, ORANGE, PURPLE, TINT, save

ENCODER = [  # from below: name, colour, is it the one that becomes experts
    ("self-attention", FAINT),
    ("add & norm", FAINT),
    ("intermediate.dense   H → I", ORANGE),
    ("GELU", FAINT),
    ("output.dense   I → H", FAINT),
    ("add & norm", FAINT),
]


def draw() -> Path:
    """Draw ``imgs/moe_layer.png``."""
    figure = plt.figure(figsize=(13.5, 7.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 135), ylim=(0, 74))
    axes.axis("off")
    axes.text(4, 70, "Experts out of a pretrained layer", size=17, weight="bold", va="center")
    axes.text(
        4, 66.2, "--moe intermediate --num_experts 2 --num_experts_per_tok 1", size=11.5, color=FAINT, va="center",
        family="DejaVu Sans Mono",
    )  # fmt: skip
    block = _encoder_layer(axes)
    _expert_layer(axes, block)
    return save(figure, "moe_layer")


def _encoder_layer(axes: Axes) -> tuple[float, float]:
    """The column on the left; returns lower and upper edge of the box that becomes experts."""
    left, width, height, gap = 7.0, 29.0, 5.4, 2.7
    y, found = 9.0, (0.0, 0.0)
    axes.text(left + width / 2, 61.2, "one layer of the encoder (XLM-R)", size=12, weight="bold", ha="center")
    axes.add_patch(
        FancyBboxPatch((left - 3, 5.6), width + 6, 53.2, boxstyle="round,pad=0,rounding_size=1.6", facecolor="white",
                       edgecolor=LINE, linewidth=1.4)
    )  # fmt: skip
    for index, (name, colour) in enumerate(ENCODER):
        _box(axes, left, y, width, height, name, colour, size=12)
        if colour == ORANGE:
            found = (y, y + height)
        if index:
            _arrow(axes, (left + width / 2, y - gap), (left + width / 2, y))
        y += height + gap
    _arrow(axes, (left + width / 2, 3.2), (left + width / 2, 9.0))
    _arrow(axes, (left + width / 2, y - gap), (left + width / 2, y + 1.6))
    return found


def _expert_layer(axes: Axes, block: tuple[float, float]) -> None:
    left, right, low, high = 48.0, 130.0, 17.0, 61.0
    for start, end in zip(block, (low + 1, high - 1), strict=True):
        axes.plot([36, left], [start, end], color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.add_patch(
        FancyBboxPatch((left, low), right - left, high - low, boxstyle="round,pad=0,rounding_size=1.6",
                       facecolor="#fffaf2", edgecolor=ORANGE, linewidth=1.4)
    )  # fmt: skip

    # from below: the token, the router and the experts, their weighted sum
    centre = 93.0
    axes.text(centre, 13.3, "token  $x$   [H]", size=13, ha="center", va="center")
    axes.plot([centre, centre], [15.0, 22.0], color=INK, linewidth=1.5)
    axes.plot([centre, 116], [22.0, 22.0], color=LINE, linewidth=1.5)
    axes.plot([60.5, centre], [22.0, 22.0], color=INK, linewidth=1.5)
    _arrow(axes, (60.5, 22.0), (60.5, 26.5))
    _box(axes, 51.5, 26.5, 18, 9.5, "router\ngate(x)   [N]", PURPLE, size=12)
    _box(axes, 51.5, 41.0, 18, 7.0, "top-k, softmax\nover the chosen", PURPLE, size=11)
    _arrow(axes, (60.5, 36.0), (60.5, 41.0), PURPLE)

    experts = [(80.0, "expert 0", BLUE, True), (98.0, "expert 1", GREEN, False), (116.0, "…  N − 1", FAINT, False)]
    for x, name, colour, chosen in experts:
        label = f"{name}\nH → I" if colour != FAINT else name
        _box(axes, x - 7.0, 28.0, 14, 8.5, label, colour, size=12, dashed=not chosen)
        _arrow(axes, (x, 22.0), (x, 28.0), INK if chosen else LINE)
    _box(axes, 73.0, 50.0, 14, 6.0, r"$\sum_{e}\; w_e\, f_e(x)$", ORANGE, size=13)
    _arrow(axes, (80, 36.5), (80, 50.0), BLUE)
    axes.plot([60.5, 60.5], [48.0, 53.0], color=PURPLE, linewidth=1.5)
    _arrow(axes, (60.5, 53.0), (73.0, 53.0), PURPLE)
    axes.text(66.7, 54.6, "weights $w$", size=11, color=PURPLE, ha="center", va="center")
    _arrow(axes, (80, 56.0), (80, 64.2))
    axes.text(81.6, 63.4, "to GELU   [I]", size=12, va="center")
    axes.text(89.0, 53.6, "only the chosen experts compute;\nk = 1: one of them, with weight 1", size=11.5,
              va="center", linespacing=1.4)  # fmt: skip
    axes.text(84.5, 40.6, "every expert starts as a copy of the pretrained layer", size=11.5, va="center")

    axes.text(48, 9.0, "Router and gradient", size=12, weight="bold", va="center", color=PURPLE)
    axes.text(
        48, 4.8,
        "As published, with k = 1 the weight is always 1: the gate gets no gradient, and its first split stays.\n"
        "--router_gradient straight_through keeps the same output and lets the gate learn.",
        size=11, va="center", linespacing=1.45,
    )  # fmt: skip


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float,
    dashed: bool = False,
) -> None:  # fmt: skip
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.0", facecolor=TINT[colour],
                       edgecolor=colour, linewidth=1.5, linestyle=(0, (4, 2)) if dashed else "-")
    )  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, size=size, ha="center", va="center", linespacing=1.4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **look))
