"""Rows out of sentence-transformers' training tables: JSON lines (objects or arrays), CSV or TSV with a header.

Columns count by place, as in sentence-transformers: query, positive, then negatives; ``label``, ``labels``, ``score``
and ``scores`` are apart. What ``mine_hard_negatives`` writes is read in these of its forms: triplet, n-tuple,
n-tuple-scores, labeled-pair. Neighboring lines of one query become one row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from FlagEmbedding.schema import Problem, Problems
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import numbered_lines, open_text, parse_json

_LABELS = ("label", "labels", "score", "scores")
_HINT = "give query, positive and negatives as columns, in this order"


@dataclass(frozen=True)
class Triple:
    """One line: passages by what each is to the query, and the scores of all where the line has them."""

    query: str
    pos: list[str]
    neg: list[str]
    scores: list[float] | None = None


def read_triples(path: Path, problems: Problems) -> Iterator[Triple]:
    """The lines of a file; what cannot be read goes to ``problems``."""
    for line, names, values in _lines(path, problems):
        found = _triple(names, values)
        if isinstance(found, Triple):
            yield found
        else:
            problems.add(Problem(str(path), line, "", found, _HINT))


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, list[str], list[Any]]]:
    """``(line, column names, values)``; an array has no names."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("jsonl", "json", "csv", "tsv"):
        raise DataError(f"{path}: expected .jsonl, .csv or .tsv (or one of them with .gz), found .{kind}")
    if kind in ("csv", "tsv"):
        try:
            with open_text(path) as stream:
                reader = csv.reader(stream, delimiter="," if kind == "csv" else "\t")
                header = next(reader, [])
                yield from ((reader.line_num, header, values) for values in reader if values)
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 text file") from error
        return
    for number, line in numbered_lines(path, "triples"):
        try:
            value = parse_json(line)
        except ValueError as error:
            problems.add(Problem(str(path), number, "", f"broken JSON ({error})", "write one row per line"))
            continue
        names = list(value) if isinstance(value, dict) else []
        yield number, names, list(value.values()) if isinstance(value, dict) else _list(value)


def _triple(names: Sequence[str], values: Sequence[Any]) -> Triple | str:
    """The line, or what is wrong with it."""
    if names and len(names) != len(values):
        return f"{len(values)} columns under a header of {len(names)}"
    label = next((i for i, name in enumerate(names) if name in _LABELS), None)
    texts = [value for i, value in enumerate(values) if i != label]
    if not all(isinstance(text, str) and text.strip() for value in texts for text in _list(value)):
        return "a text is missing, empty or no text"
    if len(texts) < 2 or not isinstance(texts[0], str):
        return f"{len(texts)} columns of text"
    query, positives, negatives = texts[0], _list(texts[1]), [text for value in texts[2:] for text in _list(value)]
    if label is None:
        return Triple(query, positives, negatives)
    try:
        numbers = [float(number) for number in _list(values[label])]
    except (TypeError, ValueError):
        return f"{names[label]} is {values[label]!r}"
    if len(numbers) == 1 and len(positives) == 1 and not negatives:  # a labeled pair
        return Triple(query, positives, []) if numbers[0] >= 0.5 else Triple(query, [], positives)
    if len(numbers) != len(positives) + len(negatives):
        return f"{len(numbers)} scores for {len(positives) + len(negatives)} passages"
    return Triple(query, positives, negatives, numbers)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def rows_of_triples(triples: Iterator[Triple]) -> Iterator[dict[str, Any] | None]:
    """A row for each run of lines of one query; None for a query without a positive.

    A passage counts once, as a positive if any line says so. Scores are kept where every line of the query has them.
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
        negatives = {text: score for text, score in negatives.items() if text not in positives}
        row: dict[str, Any] = {"query": query, "pos": list(positives)}
        if negatives:
            row["neg"] = list(negatives)
        if negatives and None not in positives.values() and None not in negatives.values():
            row |= {"pos_scores": list(positives.values()), "neg_scores": list(negatives.values())}
        yield row
