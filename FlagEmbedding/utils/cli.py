"""The frame of every entry point: one clear line for a user's mistake, and flags that read as published.

``--fp16`` is published both bare and with a value (``y``, ``True``); ``add_bool_flag`` takes all of these.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NoReturn, ParamSpec, TypeVar

from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.logging import configure_logging

P = ParamSpec("P")
A = TypeVar("A")

_TRUE = {"y", "yes", "true", "t", "1", "on"}
_FALSE = {"n", "no", "false", "f", "0", "off"}


def parse_bool(text: str | bool) -> bool:
    """``y/yes/true/t/1/on`` and their opposites, any case. Raises ``ArgumentTypeError`` for anything else."""
    if isinstance(text, bool):
        return text
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False (also y/n, yes/no, 1/0), got {text!r}")


def add_bool_flag(
    parser: argparse._ActionsContainer, *names: str, default: bool = False, help: str = "", dest: str | None = None
) -> None:
    """Add a switch that may stand bare (``--fp16``) or with a value (``--fp16 y``, ``--fp16 False``)."""
    parser.add_argument(
        *names,
        dest=dest or names[0].lstrip("-").replace("-", "_"),
        nargs="?",
        const=True,
        default=default,
        type=parse_bool,
        metavar="BOOL",
        help=help,
    )


class Parser(argparse.ArgumentParser):
    """Refuses in one line and takes no abbreviated flag."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all options)")

    def parse(self, kind: type[A], argv: Sequence[str] | None) -> A:
        """The command line as the dataclass ``kind``, whose fields are flags of this parser."""
        found = vars(self.parse_args(argv))
        return kind(**{field.name: found[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def entry_point(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap ``main``: configure logging, turn a ``UserError`` into ``error: …`` on stderr and exit code 2.

    Ctrl-C exits with 130, a reader that closed our output (``| head``) with 141, both quietly.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        configure_logging()
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The interpreter flushes stdout once more at exit; give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return run
