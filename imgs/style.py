"""Colours, fonts and saving, shared by all figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent

INK = "#1f2933"
FAINT = "#7b8794"
LINE = "#cbd2d9"
BLUE = "#2563eb"  # the query, the contrastive loss
GREEN = "#059669"  # the positive
RED = "#dc2626"  # the negative
ORANGE = "#d97706"  # the penalty, the negative's own query
PURPLE = "#7c3aed"  # the router
TINT = {BLUE: "#e8effd", GREEN: "#e3f4ee", RED: "#fdeaea", ORANGE: "#fdf1e0", PURPLE: "#f1eafd", FAINT: "#f3f5f7"}

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "mathtext.fontset": "cm",
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "figure.facecolor": "white",
    }
)


def save(figure: Figure, name: str) -> Path:
    """Write ``imgs/{name}.png`` and close the figure; the bytes depend on the drawing alone."""
    path = HERE / f"{name}.png"
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return path
