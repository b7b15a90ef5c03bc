"""The entry point of ``query_generation``; what the work needs is imported once the command line is right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.mining.query_generation.arguments import parse_query_options
from FlagEmbedding.utils.cli import entry_point


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, find the queries, print the report."""
    options = parse_query_options(argv)
    from FlagEmbedding.mining.query_generation.pipeline import generate_queries
    from FlagEmbedding.mining.query_generation.report import dry_run_page, markdown

    record = generate_queries(options)
    print(dry_run_page(record) if record["dry_run"] else markdown(record), end="")
    return 0
