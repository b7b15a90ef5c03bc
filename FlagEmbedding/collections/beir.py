"""BEIR's layout (Thakur et al. 2021, arXiv 2104.08663), each file plain or with ``.gz``:

    corpus.jsonl          {"_id", "title", "text"} per line
    queries.jsonl         {"_id", "text"} per line, of all splits
    qrels/{split}.tsv     query-id, corpus-id, score below a header

For several languages each has a folder of its own below the one that is named: ``{folder}/{lang}/corpus.jsonl``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from FlagEmbedding.schema import Problems, kind_of, read_rows
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.texts import half_pair, is_blank

logger = get_logger(__name__)

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"


def beir_folder(place: PathLike, lang: str, only_language: bool = True) -> Path | None:
    """The folder in BEIR's layout at ``place`` for ``lang``; None: there is none.

    Args:
        only_language: False when other languages are read too; then ``place`` itself cannot be the data of all.
    """
    for folder in (Path(place) / lang, Path(place)):
        if _packed(folder / CORPUS) is not None:
            if folder == Path(place) and not only_language:
                raise DataError(
                    f"{folder}: one BEIR folder for several languages; give one language, or a folder for each in it"
                )
            return folder
    return None


def beir_file(folder: Path, name: str) -> Path:
    """A file of a BEIR folder, packed or not. Raises ``DataError`` where it is not there."""
    found = _packed(folder / name)
    if found is None:
        raise DataError(f"{folder / name}: no such file; expected a BEIR folder with corpus, queries and qrels")
    return found


def beir_qrels(folder: Path, split: str) -> Path:
    """The judgments of a split. Where nothing is judged for dev, as in most of BEIR, those of test, with a line."""
    if split == "dev" and _packed(folder / "qrels/dev.tsv") is None and _packed(folder / "qrels/test.tsv") is not None:
        logger.warning("%s: there is no qrels/dev.tsv: reading qrels/test.tsv (--split test says so)", folder)
        split = "test"
    return beir_file(folder, f"qrels/{split}.tsv")


def read_beir_queries(path: Path, wanted: Collection[str] | None = None) -> dict[str, str]:
    """``qid -> query`` of a ``queries.jsonl``, in its order; only those ``wanted``, where that is given.

    Raises:
        DataError: with the problems of the file; a query that is wanted is not in it; there is none.
    """
    problems, queries, lines = Problems(), dict[str, str](), dict[str, int]()
    for line, row in read_rows(path, problems):
        qid, text = row.get("_id"), row.get("text")
        if not isinstance(qid, str) or not isinstance(text, str) or is_blank(text):
            problems.report(str(path), line, "", "no _id and text", "give every query both, as texts")
        elif half_pair(qid) or half_pair(text):
            problems.report(str(path), line, "", "half of a surrogate pair", "write whole characters")
        elif qid.split() != [qid]:
            problems.report(str(path), line, "_id", f"is {kind_of(qid)}", "give one word without white space")
        elif qid in lines:
            hint = "remove one of the two"
            problems.report(str(path), line, "_id", f"{qid!r} was there before, in line {lines[qid]}", hint)
        else:
            lines[qid] = line
            if wanted is None or qid in wanted:
                queries[qid] = text.strip()
    problems.raise_if_any()
    missing = set(wanted or ()).difference(queries)
    if missing:
        raise DataError(f"{path}: query {min(missing)!r} is judged and not there ({len(missing)} such); add it")
    if not queries:
        raise DataError(f"{path}: no queries in it")
    return queries


def _packed(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)
