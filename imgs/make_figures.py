"""Draw the project's pictures into ``imgs/``: ``python imgs/make_figures.py``, or ``make figures``."""

from __future__ import annotations

import contrastive_vs_clp
import loss_formula
import moe_layer
import table


def main() -> None:
    """Draw all of them and say where they are."""
    for figure in (loss_formula, contrastive_vs_clp, moe_layer, table):
        print(figure.draw())


if __name__ == "__main__":
    main()
