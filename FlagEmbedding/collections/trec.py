"""Topics, judgments (qrels) and runs: read strictly and written in this file alone, and where qrels may lie.

A line that does not parse ends the reading with file, line, what was expected and what was found: a score over half
a file looks like any other score. Sorting is trec_eval's: scores in single precision, ties by docid descending.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike, atomic_open, numbered_lines
from FlagEmbedding.utils.texts import is_blank

Topics = dict[str, str]  # qid -> query
Qrels = dict[str, dict[str, int]]  # qid -> docid -> grade
Run = dict[str, dict[str, float]]  # qid -> docid -> score

_QRELS_LINE = "'qid 0 docid grade'"
_BEIR_LINE = "'qid Q0 docid grade' or 'qid docid grade'"
_RUN_LINE = "'qid Q0 docid rank score tag'"
_SCORE = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # Python also takes 1_0 and other digits
_GRADE = re.compile("[+-]?[0-9]{1,9}")  # what trec_eval's integers hold


def read_topics(path: PathLike) -> Topics:
    """A topics file (also ``.gz``), ``qid, tab, query``, in its order.

    Raises:
        DataError: it is missing, empty or broken, or a query is there twice.
    """
    topics: Topics = {}
    for number, line in numbered_lines(path, "topics"):
        qid, tab, query = line.rstrip("\r\n").partition("\t")
        if not tab or is_blank(qid) or is_blank(query):
            raise DataError(f"{path}:{number}: expected 'qid<tab>query', found {_short(line)}")
        if "\r" in query.strip():
            raise DataError(f"{path}:{number}: a carriage return within the query; end lines with \\n or \\r\\n")
        if len(qid.split()) != 1:
            raise DataError(f"{path}:{number}: a qid holds no white space, found {qid!r}")
        if qid in topics:
            raise DataError(f"{path}:{number}: query {qid!r} is there twice")
        topics[qid] = query.strip()
    if not topics:
        raise DataError(f"{path}: no queries in it")
    return topics


def read_qrels(path: PathLike, *, beir: bool | None = False) -> Qrels:
    """A qrels file (also ``.gz``): ``qid 0 docid grade``, tabs or spaces, grades whole numbers.

    Args:
        beir: take BEIR's three columns (``qid docid grade``), too, below a header or without one; None: below one.

    Raises:
        DataError: it is missing, empty or broken, gives a passage two grades, or has no grade above 0 (every score
            would be 0).
    """
    qrels: Qrels = {}
    counts, expected = ((3, 4), _BEIR_LINE) if beir else ((4,), _QRELS_LINE)
    first = True
    for number, words in _columns(path, "qrels", (3, 4), expected):
        if beir is not False and first and len(words) == 3 and words[-1].lower() in ("score", "grade", "relevance"):
            counts, expected, first = (3,), "'qid docid grade', as the header says", False
            continue
        first = False
        if len(words) not in counts:
            raise _other_columns(path, number, expected, words)
        qid, docid, text = words[0], words[-2], words[-1]
        if not _GRADE.fullmatch(text):
            where = f"as grade (column {len(words)})"
            raise DataError(f"{path}:{number}: expected a whole number of -2 to 1000 {where}, found {_short(text)}")
        grade = int(text)
        if qrels.setdefault(qid, {}).setdefault(docid, grade) != grade:
            raise DataError(f"{path}:{number}: query {qid} judges passage {docid!r} twice, with different grades")
        # -1 and -2 say that a passage was not pooled. Of huge grades trec_eval makes an nDCG of 0 beside an MRR of 1.
        if not -2 <= grade <= 1000:
            raise DataError(f"{path}:{number}: expected a grade of -2 to 1000, found {_short(text)}")
    if not qrels:
        raise DataError(f"{path}: the qrels file is empty")
    if not any(grade > 0 for judged in qrels.values() for grade in judged.values()):
        raise DataError(f"{path}: no grade above 0 in it, so there is nothing to find")
    return qrels


def relevant(judged: dict[str, int]) -> list[str]:
    """The docids that are judged relevant (grade above 0), in file order."""
    return [docid for docid, grade in judged.items() if grade > 0]


def read_run(path: PathLike) -> Run:
    """A run file (also ``.gz``): ``qid Q0 docid rank score tag``, separated by white space.

    The rank column is not used, as in trec_eval: scores decide.

    Raises:
        DataError: it is missing, empty or broken, a score is no finite number, or a query lists a docid twice.
    """
    run: Run = {}
    for number, (qid, _, docid, _, text, _) in _columns(path, "run", (6,), _RUN_LINE):
        score = float(text) if _SCORE.fullmatch(text) else math.nan
        if not math.isfinite(score):
            raise DataError(f"{path}:{number}: expected a finite number as score (column 5), found {text!r}")
        hits = run.setdefault(qid, {})
        if docid in hits:
            raise DataError(f"{path}:{number}: query {qid} lists passage {docid!r} twice")
        hits[docid] = score
    if not run:
        raise DataError(f"{path}: the run file is empty; run step1-search_results.py again")
    return run


def write_run(path: PathLike, found: Iterable[tuple[str, Iterable[tuple[str, float]]]], tag: str = "Faiss") -> None:
    """A run file: ``qid Q0 docid rank score tag``, score with 6 decimals, rank from 1.

    Args:
        found: each qid with its docids and scores, best first.
    """
    with atomic_open(path) as stream:
        for qid, hits in found:
            for place, (docid, score) in enumerate(hits, 1):
                stream.write(f"{qid} Q0 {docid} {place} {score:.6f} {tag}\n")


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

    Args:
        only_language: False when other languages are evaluated too; then one file cannot be the qrels of all.
    """
    place = Path(place)
    if place.is_file():
        if not only_language:
            raise DataError(f"--qrels_dir {place}: one file for several languages; give a folder, or one language")
        return place
    return next((place / name for name in qrels_names(lang, split) if (place / name).is_file()), None)


def _columns(path: PathLike, kind: str, counts: Sequence[int], expected: str) -> Iterator[tuple[int, list[str]]]:
    """``(line number, words)`` of every line that is not blank. Raises ``DataError`` for another number of words."""
    for number, line in numbered_lines(path, kind):
        words = line.split()
        if len(words) not in counts:
            raise _other_columns(path, number, expected, words)
        yield number, words


def _other_columns(path: PathLike, number: int, expected: str, words: Sequence[str]) -> DataError:
    found = f"{len(words)} columns in {_short(' '.join(words))}"
    return DataError(f"{path}:{number}: expected {expected}, found {found}")


def _short(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
