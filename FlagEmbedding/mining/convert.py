"""Other people's retrieval data as training rows: ``python -m FlagEmbedding.mining.convert``.

    --format miracl    topics, qrels and corpus in MIRACL's layout, from --data_dir or the hub
    --format beir      a BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv
    --format triples   sentence-transformers' (anchor, positive, negative …) tables

A query becomes one row: ``pos`` are the passages judged relevant (grade above 0), ``neg`` those judged with grade 0,
if any. A row without ``neg`` is not ready for training; ``hard_negatives`` mines its negatives. The corpus is
streamed into a scratch file, so memory grows with the queries only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import Qrels, Topics, read_qrels, read_topics, relevant
from FlagEmbedding.mining.common.alignment import text_key
from FlagEmbedding.mining.common.jobs import Job, Progress, check_output
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files
from FlagEmbedding.mining.common.triples import read_triples, rows_of_triples
from FlagEmbedding.schema import Problem, Problems, read_rows
from FlagEmbedding.utils.cli import Parser, add_bool_flag, entry_point
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


def judged_rows(queries: Topics, qrels: Qrels, store: PassageStore, negatives: str) -> Iterator[dict[str, Any] | None]:
    """A row for each query in order; None for one without a relevant passage in the corpus.

    :param negatives: 'judged' takes those of grade 0 along, 'none' leaves them out.
    """
    rows = store.rows_of({docid for judged in qrels.values() for docid in judged})
    for qid, query in queries.items():
        judged = qrels.get(qid, {})
        good = relevant(judged)
        positives = _texts(good, rows, store, ())
        if not positives:
            yield None
            continue
        row: dict[str, Any] = {"query": query, "pos": positives}
        bad = [docid for docid in judged if docid not in good]
        others = _texts(bad, rows, store, positives) if negatives == "judged" else []
        yield {**row, "neg": others} if others else row


def _texts(docids: Sequence[str], rows: dict[str, int], store: PassageStore, but: Sequence[str]) -> list[str]:
    """The texts of passages that the corpus has, each once, without those that are among ``but``."""
    seen, texts = {text_key(text) for text in but}, []
    for docid in docids:
        text = store[rows[docid]] if docid in rows else ""
        if text.strip() and text_key(text) not in seen:
            seen.add(text_key(text))
            texts.append(text)
    return texts


def read_beir_queries(path: Path) -> dict[str, str]:
    """``qid -> query`` of a BEIR ``queries.jsonl``. Raises ``DataError``."""
    problems, queries = Problems(), {}
    for line, row in read_rows(path, problems):
        qid, text = row.get("_id"), row.get("text")
        if not isinstance(qid, str) or not isinstance(text, str) or not text.strip():
            problems.add(Problem(str(path), line, "", "no _id and text", "give every query both"))
        else:
            queries[qid] = text.strip()
    problems.raise_if_any()
    return queries


def convert(a: argparse.Namespace) -> tuple[int, int]:
    """Run the command; returns the numbers of rows and of those without ``neg``. Raises ``UserError``."""
    output = Path(a.output_file)
    check_output(output, a.overwrite)
    work = output.with_name(f".{output.name}.work")
    inputs, rows = _open(a, work)
    identity = {
        "format": a.format, "inputs": [file["sha256"] for file in fingerprints(inputs)],
        "negatives": a.negatives, "with_title": a.with_title,
    }  # fmt: skip
    counts = {"rows": 0, "skipped": 0, "bare": 0}
    with Job(output, identity, overwrite=a.overwrite) as job:
        progress = Progress("rows", done=job.done)
        for row in islice(rows, job.done, None):
            job.add([] if row is None else [row], "skipped" if row is None else "rows" if "neg" in row else "bare")
            progress.step()
        for note in job.notes():
            counts[note] += 1
        if not counts["rows"] + counts["bare"]:
            raise DataError(f"{inputs[0]}: no query with a relevant passage in it")
        job.finish()
    shutil.rmtree(work, ignore_errors=True)
    if counts["skipped"]:
        logger.info("%d queries have no relevant passage in the corpus and are left out", counts["skipped"])
    return counts["rows"] + counts["bare"], counts["bare"]


def _open(a: argparse.Namespace, work: Path) -> tuple[list[Path], Iterable[dict[str, Any] | None]]:
    """The files that decide the output, and the rows."""
    if a.format == "triples":
        files = [Path(name) for name in a.input]
        _check_triples(files)
        problems = Problems()
        return files, rows_of_triples(triple for path in files for triple in read_triples(path, problems))
    work.mkdir(parents=True, exist_ok=True)
    if a.format == "miracl":
        miracl.check_languages([a.language])
        place = (a.language, a.split, a.data_dir, a.cache_dir)
        topics, qrels = miracl.topics_file(*place), miracl.qrels_file(*place)
        corpus = miracl.corpus_files(a.language, a.data_dir, a.cache_dir)
        queries = read_topics(topics)
    else:
        folder = Path(a.input[0])
        topics, qrels, passages = _beir_files(folder, a.split)
        queries, corpus = read_beir_queries(topics), corpus_files([passages], work)
    store = PassageStore.prepare(corpus, work, a.with_title)
    return [topics, qrels, *corpus], judged_rows(
        queries, read_qrels(qrels, beir=a.format == "beir"), store, a.negatives
    )


def _check_triples(files: Sequence[Path]) -> None:
    """Read everything once, so that problems are known before anything is written."""
    problems = Problems()
    for path in files:
        for _ in read_triples(path, problems):
            pass
    problems.raise_if_any()


def _beir_files(folder: Path, split: str) -> tuple[Path, Path, Path]:
    """Queries, judgements and corpus of a BEIR folder, packed or not."""

    def one(name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise DataError(f"{folder / name}: no such file; expected a BEIR folder with corpus, queries and qrels/{split}")

    return one("queries.jsonl"), one(f"qrels/{split}.tsv"), one("corpus.jsonl")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check. Raises ``UsageError``."""
    parser = Parser("MIRACL, BEIR or sentence-transformers triples as training rows.")
    add = parser.add_argument
    add("--format", choices=["miracl", "beir", "triples"], required=True, help="what is read")
    add("--input", nargs="+", default=[], metavar="PATH", help="a BEIR folder, or files of triples")
    add("--data_dir", help="folder in MIRACL's layout, asked before the hub")
    add("--language", help="MIRACL language")
    add("--split", default="train", help="of MIRACL or BEIR")
    add("--output_file", required=True, metavar="FILE", help="the rows")
    add("--negatives", choices=["judged", "none"], default="judged", help="what becomes of passages of grade 0")
    add_bool_flag(parser, "--with_title", default=None, help="title and text; default: as is usual, so for BEIR only")  # type: ignore[arg-type]
    add("--cache_dir", help="where the hub's files are kept")
    add_bool_flag(parser, "--overwrite", help="replace an output that is there")
    a = parser.parse_args(argv)
    if a.format == "miracl" and (not a.language or a.input):
        raise UsageError("--format miracl needs --language (and perhaps --data_dir), and no --input")
    if a.format != "miracl" and (not a.input or a.language or a.data_dir):
        raise UsageError(f"--format {a.format} needs --input, and neither --language nor --data_dir")
    if a.format == "beir" and len(a.input) > 1:
        raise UsageError("--format beir reads one folder at a time: merge the results")
    a.with_title = a.format == "beir" if a.with_title is None else a.with_title
    return a


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert."""
    a = parse(argv)
    rows, bare = convert(a)
    print(f"{a.output_file}: {rows:,} rows")
    if bare:
        command = f"python -m FlagEmbedding.mining.hard_negatives --input_file {a.output_file} …"
        print(f"  {bare:,} of them have no neg yet: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
