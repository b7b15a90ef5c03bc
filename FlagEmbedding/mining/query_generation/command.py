"""The entry point of ``query_generation``; what the work needs is imported once the command line is right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.mining.query_generation.arguments import DESCRIPTION, EXAMPLES, QueryOptions
from FlagEmbedding.utils.cli import entry_point, parse_whole


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, find the queries, print the report."""
    options = parse_whole(QueryOptions, argv, DESCRIPTION, EXAMPLES)
    from FlagEmbedding.mining.query_generation.pipeline import generate_queries
    from FlagEmbedding.mining.query_generation.report import dry_run_page, markdown

    record = generate_queries(options)
    print(dry_run_page(record) if record["dry_run"] else markdown(record), end="")
