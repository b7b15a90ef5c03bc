"""``python -m FlagEmbedding.merge BASE TUNED … --output_dir OUT``: one checkpoint out of several, by their weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from FlagEmbedding.merge.arguments import MergeOptions
from FlagEmbedding.utils.cli import entry_point, parse_whole

WHAT = "Average the weights of a base and what was trained from it, or of several trainings, into one checkpoint."
EXAMPLE = """Examples:
  python -m FlagEmbedding.merge BAAI/bge-m3 out --weights 0.5 0.5 --output_dir merged
  python -m FlagEmbedding.merge BAAI/bge-m3 out --sweep 0.25 0.5 0.75 --eval_data_dir DIR --eval_languages ko \\
      --output_dir merged"""


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and merge."""
    options = parse_whole(MergeOptions, argv, WHAT, EXAMPLE)

    from FlagEmbedding.merge.sweep import name_of, page, run

    outcome = run(options)
    if outcome.systems:
        print(f"{page(outcome)}\n")
    print(f"{options.merge.output_dir}: {name_of(outcome.weights)} of {', '.join(options.merge.models)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
