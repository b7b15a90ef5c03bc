"""Other people's retrieval data as training rows: ``python -m FlagEmbedding.mining.convert``.

    --format miracl    topics, qrels and corpus in MIRACL's layout, from --data_dir or the hub
    --format beir      a BEIR folder: corpus.jsonl, queries.jsonl, qrels/{split}.tsv
    --format triples   sentence-transformers' (anchor, positive, negative …) tables

A query becomes one row: ``pos`` are the passages judged relevant (grade above 0), ``neg`` those judged with grade 0,
if any. A row without ``neg`` is not ready for training; ``hard_negatives`` mines its negatives. The corpus is
streamed into a scratch file, so memory grows with the queries only.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from FlagEmbedding.mining.common.options import OutputArguments
from FlagEmbedding.utils.cli import choice, entry_point, option, parse, switch
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.logging import get_logger

if TYPE_CHECKING:  # brings numpy, and with it a slower --help
    from FlagEmbedding.mining.common.passages import PassageStore

logger = get_logger(__name__)

Format = Literal["miracl", "beir", "triples"]
Negatives = Literal["judged", "none"]


@dataclass(frozen=True)
class ConvertArguments:
    """What is read."""

    format: Format = choice(Format, help="what is read")
    input: list[str] = option([], "a BEIR folder, or files of triples", metavar="PATH")
    data_dir: str | None = option(None, "folder in MIRACL's layout, asked before the hub")
    language: str | None = option(None, "MIRACL language")
    split: str = option("train", "of MIRACL or BEIR")
    negatives: Negatives = choice(Negatives, "judged", "what becomes of passages of grade 0")
    with_title: bool | None = switch(None, "title and text; default: as is usual, so for BEIR only")
    cache_dir: str | None = option(None, "where the hub's files are kept")

    def __post_init__(self) -> None:
        if self.format == "miracl" and (not self.language or self.input):
            raise UsageError("--format miracl needs --language (and perhaps --data_dir), and no --input")
        if self.format != "miracl" and (not self.input or self.language or self.data_dir):
            raise UsageError(f"--format {self.format} needs --input, and neither --language nor --data_dir")
        if self.format == "beir" and len(self.input) > 1:
            raise UsageError("--format beir reads one folder at a time: merge the results")


def convert(source: ConvertArguments, output: OutputArguments) -> Counter[str]:
    """Run the command; returns the numbers of ``rows``, of those that are ``bare`` of ``neg``, of queries ``skipped``,
    and of ``lines`` of triples, some of which ``span`` several lines of their file.

    Raises:
        UserError: something cannot be read or written.
    """
    from FlagEmbedding.mining.common.jobs import write_rows

    counts = Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for row in _triples(source.input, counts) if source.format == "triples" else _judged(source, output.path):
            counts.update(["skipped"] if row is None else ["rows"] if "neg" in row else ["rows", "bare"])
            if row is not None:
                yield row
        if not counts["rows"]:  # before the file appears
            raise DataError(f"{', '.join(source.input) or source.language}: no query with a relevant passage in it")

    write_rows(output.path, rows(), output.overwrite)
    if counts["skipped"]:
        logger.info("%d queries have no relevant passage in the corpus and are left out", counts["skipped"])
    return counts


def _triples(names: Sequence[str], counts: Counter[str]) -> Iterator[dict[str, Any] | None]:
    from FlagEmbedding.mining.common.triples import read_triples, rows_of_triples
    from FlagEmbedding.schema import Problems

    problems = Problems()
    yield from rows_of_triples(triple for name in names for triple in read_triples(Path(name), problems, counts))
    problems.raise_if_any()


def _judged(source: ConvertArguments, output: Path) -> Iterator[dict[str, Any] | None]:
    """A row for each query of MIRACL or BEIR in order; None for one without a relevant passage in the corpus."""
    from FlagEmbedding.collections.beir import CORPUS, QUERIES, beir_file, read_beir_queries
    from FlagEmbedding.collections.source import sources
    from FlagEmbedding.collections.trec import read_qrels, relevant
    from FlagEmbedding.mining.common.jobs import work_folder
    from FlagEmbedding.mining.common.passages import PassageStore, corpus_files

    beir = source.format == "beir"
    with work_folder(output) as work:
        if beir:
            folder = Path(source.input[0])
            queries = read_beir_queries(beir_file(folder, QUERIES))
            judgments = beir_file(folder, f"qrels/{source.split}.tsv")
            corpus = corpus_files([beir_file(folder, CORPUS)], work)
        else:
            assert source.language is not None
            (place,) = sources([source.language], source.split, source.data_dir, source.cache_dir).values()
            queries, judgments, corpus, beir = place.topics(), place.qrels_file(), place.corpus(), bool(place.beir)
        store = PassageStore.prepare(corpus, work, beir if source.with_title is None else source.with_title)
        qrels = read_qrels(judgments, beir=beir)
        rows = store.rows_of({docid for judged in qrels.values() for docid in judged})
        for qid, query in queries.items():
            judged = qrels.get(qid, {})
            good = relevant(judged)
            positives = _texts(good, rows, store, ())
            others = _texts([docid for docid in judged if docid not in good], rows, store, positives)
            neg = {"neg": others} if others and source.negatives == "judged" else {}
            yield {"query": query, "pos": positives, **neg} if positives else None


def _texts(docids: Sequence[str], rows: dict[str, int], store: PassageStore, but: Sequence[str]) -> list[str]:
    """The texts of passages that the corpus has, each once, without those that are among ``but``."""
    from FlagEmbedding.utils.texts import is_blank, text_key, text_keys

    seen, texts = text_keys(but), []
    for docid in docids:
        text = store[rows[docid]] if docid in rows else ""
        if not is_blank(text) and text_key(text) not in seen:
            seen.add(text_key(text))
            texts.append(text)
    return texts


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert."""
    groups = (ConvertArguments, OutputArguments)
    source, output = parse(groups, argv, "MIRACL, BEIR or sentence-transformers triples as training rows.")
    counts, name = convert(source, output), output.output_file
    print(f"{name}: {counts['rows']:,} rows")
    if counts["lines"]:
        span = f" ({counts['span']:,} of them over several lines of their file)" if counts["span"] else ""
        print(f"  read: {counts['lines']:,} lines of triples{span}")
    if counts["bare"]:
        command = f"python -m FlagEmbedding.mining.hard_negatives --input_file {name} …"
        print(f"  {counts['bare']:,} of them have no neg yet: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
