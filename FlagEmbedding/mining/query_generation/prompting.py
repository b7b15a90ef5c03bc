"""The prompts that ask for a query: plain text files, one a language, which the user may replace by others.

A prompt is one message in which ``{passage}`` stands for the passage; lines at the top that start with ``#`` are
remarks. ``--prompt`` names a file, a folder with files such as ``ko.txt`` (``default.txt`` serves the other
languages), or is the text itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from FlagEmbedding.mining.query_generation.checks import guess_language
from FlagEmbedding.utils.errors import UsageError

SHIPPED = Path(__file__).with_name("prompts")
PLACE = "{passage}"


def read_prompt(path: Path) -> str:
    """The message in a prompt file. Raises ``UsageError`` where it cannot be read or has no place for the passage."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a prompt ({error})") from error
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    text = "\n".join(lines).strip()
    if PLACE not in text:
        raise UsageError(f"--prompt {path}: expected {PLACE} where the passage goes, found none; write it there")
    return text


def make_prompter(prompt: str | None, language: str | None) -> Callable[[str], str]:
    """A function from a passage to the message about it.

    Args:
        prompt: as ``--prompt``; None takes the prompts that come with the package.
        language: code of all passages; None tells it from each passage.
    """
    place = SHIPPED if prompt is None else Path(prompt)
    if prompt is not None and (PLACE in prompt or place.is_file()):
        text = prompt if PLACE in prompt else read_prompt(place)
        return lambda passage: text.replace(PLACE, passage)
    if not place.is_dir():
        raise UsageError(f"--prompt {prompt}: no such file or folder, and no text with {PLACE} in it")

    @cache
    def of_language(code: str | None) -> str:
        named = [path for path in (place / f"{code}.txt", place / "default.txt") if path.is_file()]
        if not named:
            raise UsageError(f"--prompt {place}: neither {code}.txt nor default.txt is there; write one of them")
        return read_prompt(named[0])

    if language is not None:
        of_language(language)  # a missing file is found before any work
    return lambda passage: of_language(language or guess_language(passage)).replace(PLACE, passage)
