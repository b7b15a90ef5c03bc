"""What callers of the public classes hand in: checked here, and refused by name and position before any work.

A number, ``None`` or ``NaN`` would be embedded as the words for it once it stands behind an instruction, a dictionary's
keys in the place of its values, and a format without its fields in the place of every text.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.pages import one_line
from FlagEmbedding.utils.texts import half_pair

Texts = str | Iterable[str]
Pairs = Iterable[Sequence[str]] | Sequence[str]
PLAIN_FORMAT = "{}{}"


def as_texts(given: Texts, name: str = "texts") -> tuple[list[str], bool]:
    """The texts as a list, and whether a single one was given.

    Args:
        given: a str, or a list, tuple, generator, numpy array or pandas Series of them.
        name: what messages call it.

    Raises:
        UsageError: it is something else, or something in it is no text that can be encoded as UTF-8.
    """
    if isinstance(given, str):
        return [_text(given, name)], True
    return [_text(text, name, place) for place, text in enumerate(_listed(given, name, 1))], False


def as_pairs(given: Pairs) -> tuple[list[tuple[str, str]], bool]:
    """(query, passage) pairs as a list, and whether a single pair of two texts was given. Raises ``UsageError``."""
    listed = _listed(given, "pairs", 2)
    single = bool(listed) and isinstance(listed[0], str)
    pairs = []
    for place, pair in enumerate([listed] if single else listed):
        sides = _listed(pair, f"pairs[{place}]", 1)
        if len(sides) != 2:
            raise UsageError(f"pairs[{place}]: expected two texts, (query, passage), got {len(sides)}: {_shown(pair)}")
        pairs.append((_text(sides[0], "pairs", place, 0), _text(sides[1], "pairs", place, 1)))
    return pairs, single


def _listed(given: Any, name: str, dimensions: int) -> list[Any]:
    kind, advice = type(given).__name__, "give a str or a list of str" if dimensions == 1 else "give a list of pairs"
    if isinstance(given, Mapping | Set | bytes | bytearray | str) or hasattr(given, "columns"):
        raise UsageError(f"{name}: expected texts, got a {kind}, whose items are none in a fixed order; {advice}")
    if not 1 <= getattr(given, "ndim", 1) <= dimensions:
        raise UsageError(f"{name}: expected {dimensions} dimension(s), got {given.ndim} of a {kind}; {advice}")
    try:
        return list(given)
    except TypeError as error:
        if hasattr(given, "__iter__"):
            raise
        raise UsageError(f"{name}: expected texts, got a {kind}: {_shown(given)}; {advice}") from error


def _text(value: Any, name: str, *places: int) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"{_where(name, places)}: expected a text, got {type(value).__name__}: {_shown(value)}; leave it out, or "
            "give what is to be embedded as a str"
        )
    text = value if type(value) is str else str.__str__(value)  # a numpy.str_, or a member of an enum of texts
    if (half := half_pair(text)) is not None:
        raise UsageError(
            f"{_where(name, places)}: holds half a surrogate pair at character {half}, which UTF-8 cannot write; mend "
            "the text, or take text.encode('utf-8', 'replace').decode()"
        )
    return text


def _where(name: str, places: tuple[int, ...]) -> str:
    return name + "".join(f"[{place}]" for place in places)


def _shown(value: object) -> str:
    return one_line(repr(value), 60)


def after_instruction(texts: Sequence[str], instruction: str | None, form: str | None) -> list[str]:
    """Each text after ``instruction``, as ``form`` ("{}{}": right before it) says. Raises ``UsageError``."""
    if instruction is None:
        return list(texts)
    # A format typed on a command line holds a backslash and an n, not a line end.
    form = (form or PLAIN_FORMAT).replace("\\n", "\n")
    check_instruction(instruction, form)
    return [form.format(instruction, text) for text in texts]


def check_instruction(instruction: str | None, form: str, name: str = "instruction") -> None:
    """Raise ``UsageError`` where the instruction is no text, or its format would lose it or the text behind it."""
    if instruction is not None and not isinstance(instruction, str):
        raise UsageError(f"{name}: expected a str or None, got {type(instruction).__name__}: {_shown(instruction)}")
    for what, text in ((name, instruction or ""), (f"format of {name}", form)):
        if (half := half_pair(str(text))) is not None:
            raise UsageError(f"{what}: holds half a surrogate pair at character {half}, which UTF-8 cannot write")
    marks = "\ufdd0", "\ufdd1"  # code points that no text has
    try:
        filled = form.format(*marks)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise UsageError(f"format of {name}: {_shown(form)} cannot be filled in ({error!r}); give {{}}{{}}") from error
    if not all(mark in filled for mark in marks):
        raise UsageError(
            f"format of {name}: expected two fields, for the instruction and for the text, as in 'Instruct: {{}} "
            f"Query: {{}}', got {_shown(form)}"
        )


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int. Raises ``UsageError`` where it is none, or lies outside of ``least`` to ``most``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(f"{name}: expected a whole number, {limit}, got {_shown(value)}")
    return number
