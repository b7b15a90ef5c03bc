"""The entry point of ``doctor``. What the work needs is imported once the command line is known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.mining.doctor.arguments import parse_doctor_options
from FlagEmbedding.utils.cli import entry_point
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, examine, print the page."""
    options = parse_doctor_options(argv)
    from FlagEmbedding.mining.doctor.examine import examine
    from FlagEmbedding.mining.doctor.report import markdown

    record, problems = examine(options)
    print(markdown(record), end="")
    logger.info("report: %s", options.reading.folder / "report.md")
    problems.raise_if_any()
    return 0
