"""The entry point of ``from_corpus``; what the work needs is imported once the command line is right."""

from __future__ import annotations

import os
from collections.abc import Sequence

from FlagEmbedding.mining.from_corpus.arguments import DESCRIPTION, EXAMPLES, FromCorpusOptions
from FlagEmbedding.utils.cli import entry_point, parse_whole
from FlagEmbedding.utils.errors import UsageError


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make both folders, print the report; its last line is the command to go on with."""
    options = parse_whole(FromCorpusOptions, argv, DESCRIPTION, EXAMPLES)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("from_corpus runs in one process: start it without torchrun")
    from FlagEmbedding.mining.from_corpus.pipeline import build_from_corpus
    from FlagEmbedding.mining.from_corpus.report import dry_run_page, markdown

    record = build_from_corpus(options)
    print(dry_run_page(record) if record["dry_run"] else markdown(record), end="")
