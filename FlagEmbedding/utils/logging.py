"""Logging for library code. Only entry points configure it; other ranks than 0 stay quiet below ERROR."""

from __future__ import annotations

import logging
import os
import sys


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (``get_logger(__name__)``)."""
    return logging.getLogger(name)


def configure_logging(level: int = logging.INFO) -> None:
    """Send log lines to stderr: ``level`` and above on rank 0, errors alone on other ranks, which would repeat it."""
    first = os.environ.get("RANK", "0").strip() in ("", "0")  # what is no number is refused where it is needed
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("FlagEmbedding").setLevel(level if first else logging.ERROR)
