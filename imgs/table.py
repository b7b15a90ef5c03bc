"""The paper's table, its averages drawn against the released model. The numbers are in ``paper_table.json``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from style import BLUE, FAINT, HERE, LINE, ORANGE, PURPLE, save

GROUPS = {"baseline": FAINT, "contrastive": BLUE, "clp": ORANGE, "moe": PURPLE}
COLUMNS = (54, 63.5, 73)  # right edges of the three languages' numbers
BARS = (79, 112)  # where the averages' scale begins and ends
SCALE = (52.0, 60.5)


def draw() -> Path:
    """Draw ``imgs/paper_table.png``."""
    table = json.loads((HERE / "paper_table.json").read_text("utf-8"))
    rows, columns = table["rows"], table["columns"]
    best = [max(row["values"][c] for row in rows) for c in range(len(columns))]
    released = rows[0]["values"][-1]
    figure = plt.figure(figsize=(12.5, 5.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 125), ylim=(0, 50))
    axes.axis("off")
    axes.text(4, 46, table["title"], size=17, weight="bold", va="center")
    axes.text(121, 46, table["measure"], size=13, color=FAINT, ha="right", va="center")

    top = 39
    for x, name in zip(COLUMNS, columns, strict=False):
        axes.text(x, top, name, size=12, color=FAINT, ha="right", va="center")
    axes.text(121, top, columns[-1], size=12, color=FAINT, ha="right", va="center")
    axes.plot([4, 121], [top - 2.4, top - 2.4], color=LINE, linewidth=1.2)

    for index, row in enumerate(rows):
        y = top - 5.6 - index * 5.0
        colour = GROUPS[row["group"]]
        axes.add_patch(Rectangle((4, y - 1.7), 0.8, 3.4, color=colour))
        axes.text(6.5, y, row["name"], size=12.5, va="center")
        for x, value, highest in zip(COLUMNS, row["values"], best, strict=False):
            weight = "bold" if value == highest else "normal"
            axes.text(x, y, f"{value:.2f}", size=12.5, ha="right", va="center", weight=weight)
        average = row["values"][-1]
        place = _place(average)
        axes.plot([BARS[0], BARS[1]], [y, y], color=LINE, linewidth=0.8, zorder=1)
        axes.plot([_place(released), place], [y, y], color=colour, linewidth=3.5, zorder=2, solid_capstyle="butt")
        axes.plot(place, y, "o", ms=11, color=colour, zorder=3)
        weight = "bold" if average == best[-1] else "normal"
        axes.text(121, y, f"{average:.2f}", size=12.5, ha="right", va="center", weight=weight)
    axes.plot([_place(released)] * 2, [top - 3.4, 6.0], color=FAINT, linewidth=1.1, linestyle=(0, (3, 3)), zorder=1)
    axes.plot([4, 121], [4.6, 4.6], color=LINE, linewidth=1.2)
    axes.text(4, 2.3, table["source"], size=10, color=FAINT, va="center")
    axes.text(121, 2.3, "Bold: the best of a column. Dashed: BGE-M3 as released.", size=10, color=FAINT,
              ha="right", va="center")  # fmt: skip
    return save(figure, "paper_table")


def _place(value: float) -> float:
    """Where an average lies on the drawing."""
    return BARS[0] + (value - SCALE[0]) / (SCALE[1] - SCALE[0]) * (BARS[1] - BARS[0])
