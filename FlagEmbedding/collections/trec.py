"""TREC files: runs and qrels read strictly, and where a language's qrels may lie.

A line that does not parse ends the reading with file, line, what was expected and what was found: a score over half
a file looks like any other score. Sorting is trec_eval's: scores in single precision, ties by docid descending.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike, open_text

Qrels = dict[str, dict[str, int]]  # qid -> docid -> grade
Run = dict[str, dict[str, float]]  # qid -> docid -> score

_RUN_LINE = "'qid Q0 docid rank score tag'"
_QRELS_LINE = "'qid 0 docid grade'"


def read_run(path: PathLike) -> Run:
    """A run file (also ``.gz``): ``qid Q0 docid rank score tag``, separated by white space.

    The rank column is not used, as in trec_eval: scores decide. Raises ``DataError`` for a missing, empty or broken
    file, a score that is no finite number, and a docid that a query lists twice.
    """
    run: Run = {}
    for number, line, words in _lines(path, "run"):
        if len(words) != 6:
            raise DataError(f"{path}:{number}: expected {_RUN_LINE}, found {len(words)} columns in {_short(line)}")
        qid, _, docid, _, text, _ = words
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{path}:{number}: expected a finite number as score (column 5), found {text!r}")
        hits = run.setdefault(qid, {})
        if docid in hits:
            raise DataError(f"{path}:{number}: query {qid} lists passage {docid!r} twice")
        hits[docid] = score
    if not run:
        raise DataError(f"{path}: the run file is empty; run step1-search_results.py again")
    return run


def read_qrels(path: PathLike) -> Qrels:
    """A qrels file (also ``.gz``): ``qid 0 docid grade``, tabs or spaces, grades whole numbers.

    Raises ``DataError`` for a missing, empty or broken file, a passage judged twice, and a file without any grade
    above 0 (every score would be 0).
    """
    qrels: Qrels = {}
    for number, line, words in _lines(path, "qrels"):
        if len(words) != 4:
            raise DataError(f"{path}:{number}: expected {_QRELS_LINE}, found {len(words)} columns in {_short(line)}")
        qid, _, docid, text = words
        try:
            grade = int(text)
        except ValueError as error:
            raise DataError(f"{path}:{number}: expected a whole number as grade (column 4), found {text!r}") from error
        judged = qrels.setdefault(qid, {})
        if docid in judged:
            raise DataError(f"{path}:{number}: query {qid} judges passage {docid!r} twice")
        judged[docid] = grade
    if not qrels:
        raise DataError(f"{path}: the qrels file is empty")
    if not any(grade > 0 for judged in qrels.values() for grade in judged.values()):
        raise DataError(f"{path}: no grade above 0 in it, so there is nothing to find")
    return qrels


def ranking(hits: dict[str, float]) -> list[str]:
    """Docids in the order trec_eval evaluates: score (single precision) descending, then docid descending."""
    # float32: trec_eval keeps scores as C floats, and what is equal there is a tie.
    return sorted(hits, key=lambda docid: (float(np.float32(hits[docid])), docid), reverse=True)


def qrels_names(lang: str, split: str) -> list[str]:
    """Names under which a language's qrels are looked for below a folder, in this order."""
    hub = f"qrels.miracl-v1.0-{lang}-{split}.tsv"
    return [
        f"miracl-v1.0-{lang}_qrels_{hub}",  # published: the hub's path with _ for /
        hub,
        f"miracl-v1.0-{lang}/qrels/{hub}",
        f"miracl/miracl-v1.0-{lang}/qrels/{hub}",
        *(f"{lang}.{suffix}" for suffix in ("qrels", "tsv", "txt")),
    ]


def find_qrels(place: PathLike, lang: str, split: str = "dev", only_language: bool = True) -> Path | None:
    """The qrels of ``lang``: ``place`` if it is a file, else one of :func:`qrels_names` below it; None: absent.

    :param only_language: False when other languages are evaluated too; then one file cannot be the qrels of all.
    """
    place = Path(place)
    if place.is_file():
        if not only_language:
            raise DataError(f"--qrels_dir {place}: one file for several languages; give a folder, or one language")
        return place
    return next((place / name for name in qrels_names(lang, split) if (place / name).is_file()), None)


def _lines(path: PathLike, kind: str) -> Iterator[tuple[int, str, list[str]]]:
    """``(line number, line, its words)`` of every line that is not blank."""
    number = 0
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                words = line.split()
                if words:
                    yield number, line, words
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {kind} file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: the {kind} file cannot be read further ({error})") from error


def _short(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
