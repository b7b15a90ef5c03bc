"""The entry point of ``hard_negatives``. What the work needs is imported once the command line is known to be right."""

from __future__ import annotations

import os
from collections.abc import Sequence

from FlagEmbedding.mining.hard_negatives.arguments import parse_mining_options
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.errors import UsageError


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, mine, print the report."""
    options = parse_mining_options(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("mining runs in one process; build the index with step 0 under torchrun, then mine without it")
    from FlagEmbedding.mining.hard_negatives.pipeline import mine_hard_negatives
    from FlagEmbedding.mining.hard_negatives.report import markdown

    print(markdown(mine_hard_negatives(options)), end="")
    return 0
