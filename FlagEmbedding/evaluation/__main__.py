"""The commands of the evaluation: ``python -m FlagEmbedding.evaluation COMMAND …``.

What the work needs is imported once the command line is known to be right.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from FlagEmbedding.evaluation.arguments import EmbedOptions, ScoreArguments, SearchOptions
from FlagEmbedding.utils.cli import entry_point, parse, parse_whole, run_command

HELP = """usage: python -m FlagEmbedding.evaluation COMMAND [options]

  embed    step 0: the passages of MIRACL languages into an index
  search   step 1: the queries against the index, as TREC run files
  score    step 2: nDCG and other measures of the runs; --compare tests models
  compare  any TREC run files on the same queries, with paired significance tests

python -m FlagEmbedding.evaluation COMMAND --help lists a command's options."""


def generate_embedding(argv: Sequence[str] | None = None) -> int:
    """Step 0: an index of every language's corpus. Raises ``UserError``."""
    options = parse_whole(EmbedOptions, argv, "Embed the passages of MIRACL languages into an index on disk.")

    from FlagEmbedding.evaluation.step0 import embed_collections

    embed_collections(options)
    return 0


def search_results(argv: Sequence[str] | None = None) -> int:
    """Step 1: a run file of every language's queries. Raises ``UserError``."""
    what = "Search the index of MIRACL languages for their queries; writes TREC run files."
    options = parse_whole(SearchOptions, argv, what)

    from FlagEmbedding.evaluation.step1 import search_collections

    search_collections(options)
    return 0


def eval_dense(argv: Sequence[str] | None = None) -> int:
    """Step 2: scores of the runs, and comparisons. Raises ``UserError``."""
    what = "Score the runs of step 1 against the judgments of MIRACL languages; compare models."
    arguments: ScoreArguments = parse([ScoreArguments], argv, what)[0]

    from FlagEmbedding.evaluation.step2 import score_models

    score_models(arguments)
    return 0


embed = entry_point(generate_embedding)
search = entry_point(search_results)
score = entry_point(eval_dense)


def compare(argv: Sequence[str] | None = None) -> int:
    """Comparison of run files."""
    from FlagEmbedding.evaluation.compare import main as compare_runs

    return compare_runs(argv)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or run a command."""
    return run_command({"embed": embed, "search": search, "score": score, "compare": compare}, HELP, argv)


if __name__ == "__main__":
    sys.exit(main())
