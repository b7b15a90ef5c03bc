"""The loss as a formula: the contrastive part, the penalty, and what each symbol means."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from style import BLUE, FAINT, LINE, ORANGE, TINT, save

CONTRASTIVE = r"$-\log\,\dfrac{e^{\,s(q,\,p^{+})/\tau}}{\sum_{p\,\in\,P}\; e^{\,s(q,\,p)/\tau}}$"
PENALTY = (
    r"$\dfrac{1}{|P^{-}_{H}|}\;\sum_{p^{-}\in\,P^{-}_{H}}\;\dfrac{1}{|H^{*}(p^{-})|}"
    r"\;\sum_{h\,\in\,H^{*}(p^{-})}\left(1-\cos(h,\,p^{-})\right)$"
)
SYMBOLS = [
    (r"$q,\;p^{+}$", "a query and its positive passage"),
    (r"$P$", "all passages of the batch"),
    (r"$s(q,p)$", "cosine of their embeddings"),
    (r"$\tau$", "temperature (--temperature, 0.02)"),
    (r"$H^{*}(p^{-})$", "the queries that a negative passage answers (neg_q)"),
    (r"$P^{-}_{H}$", "the negatives of the batch that have such a query"),
    (r"$\lambda$", "weight of the penalty (--penalty_weight, 0.1)"),
]


def draw() -> Path:
    """Draw ``imgs/clp_loss.png``."""
    figure = plt.figure(figsize=(12.5, 5.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 125), ylim=(0, 56))
    axes.axis("off")
    axes.text(4, 51.5, "Loss with the contrastive learning penalty (CLP)", size=17, weight="bold", va="center")

    axes.text(4, 38, r"$\mathcal{L}\;=\;(1-\lambda)$", size=22, va="center")
    _box(axes, 21.5, 30.5, 27, 15, BLUE)
    axes.text(35, 38, CONTRASTIVE, size=21, va="center", ha="center")
    axes.text(51, 38, r"$+\;\;\lambda$", size=22, va="center")
    _box(axes, 58.5, 30.5, 62.5, 15, ORANGE)
    axes.text(89.75, 38, PENALTY, size=21, va="center", ha="center")

    for x, name, colour, text in (
        (35, "contrastive loss", BLUE, "pull the positive near, push the rest away"),
        (89.75, "penalty", ORANGE, "hold every negative near the queries that it answers itself"),
    ):
        axes.text(x, 27.6, name, size=13, weight="bold", color=colour, ha="center", va="center")
        axes.text(x, 24.9, text, size=11, ha="center", va="center")

    axes.plot([4, 121], [21.3, 21.3], color=LINE, linewidth=1)
    for index, (symbol, meaning) in enumerate(SYMBOLS):
        column, row = divmod(index, 4)
        x, y = 4 + column * 59, 17.4 - row * 4.4
        axes.text(x, y, symbol, size=15, va="center")
        axes.text(x + 9, y, meaning, size=11, va="center")
    axes.text(121, 4.4, "Yu 2024, arXiv 2412.17364", size=10, color=FAINT, ha="right", va="center")
    return save(figure, "clp_loss")


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=1.4"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=TINT[colour], edgecolor=colour))
