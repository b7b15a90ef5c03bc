"""The frame of every entry point: options as dataclasses, flags that read as published, one clear line for a mistake.

A command's options are frozen dataclasses, grouped by who reads them; each field is made by :func:`option`, which holds
the flag's default, help and other spellings, and :func:`parse` turns a command line into them. Nothing here imports
torch, so that ``--help`` and a mistyped flag are answered at once.

``--fp16`` is published both bare and with a value (``y``, ``True``); every switch takes all of these.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, ParamSpec, TypeVar, cast, get_args, get_type_hints

import simple_parsing
from simple_parsing import ArgumentGenerationMode, DashVariant

from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.logging import configure_logging
from FlagEmbedding.utils.texts import half_pair

P = ParamSpec("P")
Whole = TypeVar("Whole")

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


def option(default: Any = MISSING, help: str = "", *aliases: str, metavar: str | None = None) -> Any:
    """A field of an options class with a number, a text or a list of them: its flag's default, help and spellings.

    Args:
        default: left out, the flag is required; a list becomes a fresh copy for every instance.
        help: one line for ``--help``; the default is added there.
        aliases: other spellings, such as ``--use_fp16``.
        metavar: what stands for the value in ``--help``.
    """
    return _field(default, help, aliases, {"metavar": metavar})


def switch(default: Any = False, help: str = "", *aliases: str) -> Any:
    """A ``bool`` or ``bool | None`` field whose flag stands bare (``--fp16``) or with a value (``--fp16 y``)."""
    keywords = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL", "action": "store"}
    return _field(default, help, aliases, keywords)


def choice(
    kind: Any, default: Any = MISSING, help: str = "", *aliases: str, spellings: Mapping[str, str] | None = None
) -> Any:
    """A field that takes one of the texts of ``kind``, a ``Literal``; the field may be ``kind | None``.

    Args:
        spellings: other texts that are taken, and what each stands for.
    """

    def one_of(text: str) -> str:
        return (spellings or {}).get(text, text)

    return _field(default, help, aliases, {"type": one_of, "choices": list(get_args(kind))})


def positional(help: str = "", metavar: str = "PATH", nargs: str | None = "+") -> Any:
    """A field whose values stand without a flag: a ``list[str]``, one or more; with ``nargs=None`` one ``str``."""
    return simple_parsing.field(positional=True, nargs=nargs, help=help, metavar=metavar)


def internal(default: Any) -> Any:
    """A field that no flag sets."""
    return simple_parsing.field(default=default, cmd=False)


def _field(default: Any, help: str, aliases: tuple[str, ...], keywords: dict[str, Any]) -> Any:
    keywords = {"help": help, "alias": list(aliases), **keywords}
    if isinstance(default, list):
        keywords = {"nargs": "+", "required": False, **keywords}
        return simple_parsing.field(default_factory=lambda: list(default), **keywords)
    if default is None:
        return simple_parsing.field(default=None, **{"nargs": None, **keywords})
    return simple_parsing.field(**keywords) if default is MISSING else simple_parsing.field(default=default, **keywords)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown where there are any, and examples keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", [], argparse.SUPPRESS) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        name = action.option_strings[0].lstrip("-").upper()
        return f"{', '.join(action.option_strings)} {self._format_args(action, name)}"


class _Parser(simple_parsing.ArgumentParser):
    """Refuses in one line and takes no abbreviated flag."""

    def __init__(self, description: str, epilog: str | None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_option_string_dash_variants=DashVariant.UNDERSCORE,
            argument_generation_mode=ArgumentGenerationMode.FLAT,
        )
        self.titles: dict[str, str] = {}  # the library's heading of a group → ours

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all options)")

    def format_usage(self) -> str:
        return f"usage: {self.prog} [options]\n"

    def format_help(self) -> str:
        # The generated usage line would be a screen long; the groups below it say the same.
        self._preprocessing(args=[], namespace=None)
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for group in self._action_groups:
            if group._group_actions:
                formatter.start_section(self.titles.get(group.title or "", group.title))
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        formatter.add_text(self.epilog)
        return f"{self.format_usage()}\n{formatter.format_help()}"


def parse(groups: Sequence[type[Any]], argv: Sequence[str] | None, description: str, epilog: str | None = None) -> Any:
    """A command line as one instance of each options class, in their order.

    Args:
        groups: dataclasses whose fields are made by :func:`option`, :func:`switch` and :func:`choice`; their flags
            must differ. The first line of a class's docstring heads its part of ``--help``.
        argv: the words; None takes the program's own.
        description: what the command does, one line.
        epilog: examples, printed as they are.

    Raises:
        UsageError: unknown or missing flags, values of the wrong kind.
    """
    parser = _Parser(description, epilog)
    for group in groups:
        heading = (group.__doc__ or "").partition("\n")[0].rstrip(".")
        parser.titles[f"{group.__qualname__} ['{group.__name__}']"] = heading
        parser.add_arguments(group, dest=group.__name__)
    words = sys.argv[1:] if argv is None else list(argv)
    check_words(words)
    found = parser.parse_args(words)
    return [getattr(found, group.__name__) for group in groups]


def parse_whole(kind: type[Whole], argv: Sequence[str] | None, description: str, epilog: str | None = None) -> Whole:
    """A command line as ``kind``, a dataclass whose fields are options classes; see :func:`parse`."""
    hints = get_type_hints(kind)
    return kind(*parse([hints[field.name] for field in fields(cast(Any, kind))], argv, description, epilog))


def check_words(words: Sequence[str]) -> None:
    """Refuse what is no UTF-8 (``UsageError``): Python makes halves of surrogate pairs of it, which no file holds."""
    for place, word in enumerate(words):
        if half_pair(word) is not None:
            shown = word.encode("ascii", "backslashreplace").decode()
            flag = next((each for each in reversed(words[:place]) if each.startswith("--")), "the command line")
            raise UsageError(f"{flag}: {shown[:60]!r} is not UTF-8 text: write whole characters, rename such a file")


def flag_values(*groups: Any) -> dict[str, Any]:
    """The values of all fields that flags set, flat, for a record of what a command was told."""
    return {f.name: getattr(g, f.name) for g in groups for f in fields(g) if f.metadata.get("cmd", True)}


def run_command(commands: Mapping[str, Callable[[Sequence[str]], int]], page: str, argv: Sequence[str] | None) -> int:
    """Run the command that the first word names with the words after it; without one, print the ``page``.

    Raises:
        UsageError: there is no such command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(page)
        return 0
    if words[0] not in commands:
        raise UsageError(f"no command {words[0]!r}: choose from {' '.join(commands)}")
    sys.argv[:1] = [" ".join((*sys.argv[:1], words[0]))]  # the name that the command's usage line shows
    return commands[words[0]](words[1:])


def entry_point(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap ``main``: configure logging, turn a ``UserError`` into ``error: …`` on stderr and exit code 2.

    Ctrl-C exits with 130, a reader that closed our output (``| head``) with 141, both quietly. Characters that the
    terminal's encoding does not have are written as escapes.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal that has no "×" or "한" must not end a command
                stream.reconfigure(errors="backslashreplace")
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
