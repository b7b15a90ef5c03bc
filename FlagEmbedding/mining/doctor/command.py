"""The entry point of ``doctor``. What the work needs is imported once the command line is known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.mining.doctor.arguments import DoctorOptions
from FlagEmbedding.utils.cli import entry_point, parse_whole
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, examine, print the page."""
    description = "A report on training files: problems, repeats, false negatives, margins, lengths, neg_q."
    options = parse_whole(DoctorOptions, argv, description)
    from FlagEmbedding.mining.doctor.examine import examine
    from FlagEmbedding.mining.doctor.report import markdown

    record, problems = examine(options)
    print(markdown(record), end="")
    logger.info("report: %s", options.reading.folder / "report.md")
    problems.raise_if_any()
