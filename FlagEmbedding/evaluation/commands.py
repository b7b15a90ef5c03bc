"""The commands of the evaluation. What the work needs is imported once the command line is known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.evaluation.arguments import parse_embed_options, parse_score_arguments, parse_search_options


def generate_embedding(argv: Sequence[str] | None = None) -> int:
    """Step 0: an index of every language's corpus. Raises ``UserError``."""
    options = parse_embed_options(argv)

    from FlagEmbedding.evaluation.step0 import embed_collections

    embed_collections(options)
    return 0


def search_results(argv: Sequence[str] | None = None) -> int:
    """Step 1: a run file of every language's queries. Raises ``UserError``."""
    options = parse_search_options(argv)

    from FlagEmbedding.evaluation.step1 import search_collections

    search_collections(options)
    return 0


def eval_dense(argv: Sequence[str] | None = None) -> int:
    """Step 2: scores of the runs, and comparisons. Raises ``UserError``."""
    arguments = parse_score_arguments(argv)

    from FlagEmbedding.evaluation.step2 import score_models

    score_models(arguments)
    return 0
