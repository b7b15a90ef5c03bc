"""``python -m FlagEmbedding.evaluation COMMAND …``: step 0 to 2, and the comparison of run files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from FlagEmbedding.evaluation import commands
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.errors import UsageError

HELP = """usage: python -m FlagEmbedding.evaluation COMMAND [options]

  embed    step 0: the passages of MIRACL languages into an index
  search   step 1: the queries against the index, as TREC run files
  score    step 2: nDCG and other measures of the runs; --compare tests models
  compare  any TREC run files on the same queries, with paired significance tests

python -m FlagEmbedding.evaluation COMMAND --help lists a command's options."""

embed = entry_point(commands.generate_embedding)
search = entry_point(commands.search_results)
score = entry_point(commands.eval_dense)


def compare(argv: Sequence[str] | None = None) -> int:
    """Compare run files; the exit code."""
    from FlagEmbedding.evaluation.compare import main as compare_runs

    return compare_runs(argv)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or run a command."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = {"embed": embed, "search": search, "score": score, "compare": compare}
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] not in known:
        raise UsageError(f"no command {words[0]!r}: choose from {' '.join(known)}")
    sys.argv[0] = f"{sys.argv[0]} {words[0]}"
    return known[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
