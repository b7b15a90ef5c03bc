"""Rows out of sentence-transformers' training tables: JSON lines (objects or arrays), CSV or TSV with a header.

Columns count by name: a query (anchor, question …), a positive (answer, passage …), negatives; ``label``, ``labels``,
``score`` and ``scores`` are apart, ids are left out, and a name that says nothing is refused. An array has no names:
there the order is query, positive, then negatives. What ``mine_hard_negatives`` writes is read in these of its forms:
triplet, n-tuple, n-tuple-scores, labeled-pair. Neighboring lines of one query become one row.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from FlagEmbedding.mining.common.delimited import table_lines
from FlagEmbedding.schema import Problems
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import numbered_lines, packing, parse_json
from FlagEmbedding.utils.texts import half_pair, is_blank, text_key, text_keys

Role = Literal["query", "pos", "neg", "label", "id"]

_HINT = "give query, positive and negatives as columns, in this order"
# Names of columns, lower case with _ for what parts words; the first pattern that fits says what a column is.
_ROLES: dict[Role, str] = {
    "id": r"|id|.*_ids?|qid|pid|docid|index|idx|unnamed:_\d+|__index_level_0__",
    "label": r"labels?|scores?",
    "query": r"q|query|queries|query_text|anchors?|questions?|sentence_?1|text_?1",
    "pos": r"p|pos(itives?)?(_(passages?|doc(ument)?s?|texts?))?(_?1)?|answers?|passages?(_text)?|doc(ument)?s?|"
    r"responses?|sentence_?2|text_?2",
    "neg": r"n|(hard_?)?neg(ative)?s?(_(passages?|doc(ument)?s?|texts?))?(_?\d+)?",
}


class Fault(NamedTuple):
    """What is wrong with a line or its columns, and what to do."""

    found: str
    hint: str


@dataclass(frozen=True)
class Triple:
    """One line: passages by what each is to the query, and the scores of all where the line has them."""

    query: str
    pos: list[str]
    neg: list[str]
    scores: list[float] | None = None


def read_triples(path: Path, problems: Problems, counts: Counter[str]) -> Iterator[Triple]:
    """The lines of a file; what cannot be read goes to ``problems``.

    Args:
        counts: told how many ``lines`` of table were read, and how many of them ``span`` several lines of the file.
    """
    for line, names, values in _lines(path, problems, counts):
        counts["lines"] += 1
        found = _triple(names, values)
        if isinstance(found, Triple):
            yield found
        else:
            problems.report(str(path), line, "", *found)
            if names and isinstance(roles(names), Fault):
                return  # a header that is not understood: every line would say so


def _lines(path: Path, problems: Problems, counts: Counter[str]) -> Iterator[tuple[int, tuple[str, ...], list[Any]]]:
    """``(line, column names, values)``; an array has no names."""
    name = path.name.lower()
    kind = name[: -len(packing(name)) or None].rpartition(".")[2]
    if kind not in ("jsonl", "json", "csv", "tsv"):
        raise DataError(f"{path}: expected .jsonl, .csv or .tsv (or one of them with .gz or .zst), found .{kind}")
    if kind in ("csv", "tsv"):
        yield from table_lines(path, "," if kind == "csv" else "\t", problems, counts)
        return
    for number, line in numbered_lines(path, "triples"):
        try:
            value = parse_json(line)
        except ValueError as error:
            problems.report(str(path), number, "", f"broken JSON ({error})", "write one row per line")
            continue
        names = tuple(value) if isinstance(value, dict) else ()
        yield number, names, list(value.values()) if isinstance(value, dict) else _list(value)


@lru_cache(maxsize=64)
def roles(names: tuple[str, ...]) -> tuple[Role, ...] | Fault:
    """What each column is."""
    found: list[Role] = []
    for name in names:
        plain = re.sub(r"[\s\-.]+", "_", name.strip().lower())
        role = next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, plain)), None)
        if role is None:
            what = "rename it to query, positive, negative (several: negative_1 …) or score, or leave it out"
            return Fault(f"a column is called {name[:60]!r}, which does not say what it is", what)
        found.append(role)
    for role, called in (("query", "query"), ("pos", "positive"), ("label", "score")):
        same = [name for name, this in zip(names, found, strict=True) if this == role]
        if len(same) > 1:
            return Fault(f"the columns {' and '.join(map(repr, same[:3]))} are each the {called}", "leave one of them")
        if not same and role != "label":
            shown = ", ".join(map(repr, names[:6])) or "nothing"
            return Fault(f"no column is the {called} (they are called {shown})", f"call one of them {called}")
    return tuple(found)


def _triple(names: tuple[str, ...], values: Sequence[Any]) -> Triple | Fault:
    if names and len(names) != len(values):
        return Fault(f"{len(values)} columns under a header of {len(names)}", _HINT)
    rest: list[Role] = ["neg"] * (len(values) - 2)
    by_place: tuple[Role, ...] = ("query", "pos", *rest)
    kinds = roles(names) if names else by_place[: len(values)]
    if isinstance(kinds, Fault):
        return kinds
    columns = {
        role: [text for value, kind in zip(values, kinds, strict=True) if kind == role for text in _list(value)]
        for role in ("query", "pos", "neg", "label")
    }
    texts = [text for role in ("query", "pos", "neg") for text in columns[role]]
    if not all(isinstance(text, str) and not is_blank(text) for text in texts):
        return Fault("a text is missing, empty or no text", _HINT)
    if any(half_pair(text) for text in texts):
        return Fault("a text holds half of a surrogate pair", "write whole characters")
    if len(columns["query"]) != 1 or not columns["pos"]:
        return Fault(f"{len(texts)} columns of text", _HINT)
    (query,), positives, negatives = (columns[role] for role in ("query", "pos", "neg"))
    if "label" not in kinds:
        return Triple(query, positives, negatives)
    given = columns["label"]
    try:
        numbers = [float(number) for number in given]
    except (TypeError, ValueError, OverflowError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        return Fault(f"{names[kinds.index('label')]} is {str(given)[:60]}", "give finite numbers")
    if len(numbers) == 1 and len(positives) == 1 and not negatives:  # a labeled pair
        return Triple(query, positives, []) if numbers[0] >= 0.5 else Triple(query, [], positives)
    if len(numbers) != len(positives) + len(negatives):
        return Fault(f"{len(numbers)} scores for {len(positives) + len(negatives)} passages", "give one for each")
    return Triple(query, positives, negatives, numbers)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def rows_of_triples(triples: Iterator[Triple]) -> Iterator[dict[str, Any] | None]:
    """A row for each run of lines of one query; None for a query without a positive.

    A passage counts once, as a positive if any line says so (a twin of it, too). Scores are kept where every line of
    the query has them.
    """
    for query, group in groupby(triples, key=lambda triple: triple.query):
        positives: dict[str, float | None] = {}
        negatives: dict[str, float | None] = {}
        for triple in group:
            scores: Sequence[float | None] = triple.scores or [None] * (len(triple.pos) + len(triple.neg))
            for text, score in zip(triple.pos, scores, strict=False):
                positives.setdefault(text, score)
            for text, score in zip(triple.neg, scores[len(triple.pos) :], strict=True):
                negatives.setdefault(text, score)
        if not positives:
            yield None
            continue
        answers = text_keys(positives)
        negatives = {text: score for text, score in negatives.items() if text_key(text) not in answers}
        row: dict[str, Any] = {"query": query, "pos": list(positives)}
        if negatives:
            row["neg"] = list(negatives)
        if negatives and None not in positives.values() and None not in negatives.values():
            row |= {"pos_scores": list(positives.values()), "neg_scores": list(negatives.values())}
        yield row
