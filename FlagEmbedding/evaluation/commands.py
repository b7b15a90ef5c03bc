"""The commands of the evaluation. What the work needs is imported once the command line is known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.evaluation.arguments import EmbedOptions, ScoreArguments, SearchOptions
from FlagEmbedding.utils.cli import parse, parse_whole


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
