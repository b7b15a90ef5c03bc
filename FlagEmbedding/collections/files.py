"""Where the parts of one collection lie, and writing a small one in the same layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import Qrels, Topics
from FlagEmbedding.utils.io import PathLike, atomic_open


@dataclass(frozen=True)
class CollectionFiles:
    """One collection (a language of MIRACL): its corpus, its queries, what is judged."""

    name: str
    corpus: list[Path]
    topics: Path
    qrels: Path


def find_collection(name: str, split: str, data_dir: PathLike | None) -> CollectionFiles:
    """The files of collection ``name``. Raises ``DataError`` for what is missing."""
    return CollectionFiles(
        name,
        miracl.corpus_files(name, data_dir),
        miracl.topics_file(name, split, data_dir),
        miracl.qrels_file(name, split, data_dir),
    )


def written_files(folder: Path, name: str, split: str = "dev") -> CollectionFiles:
    """Where :func:`write_collection` puts the parts, below ``folder``."""
    parts = {
        kind: folder / f"miracl-v1.0-{name}" / kind / f"{kind}.miracl-v1.0-{name}-{split}.tsv"
        for kind in ("topics", "qrels")
    }
    corpus = [folder / f"miracl-corpus-v1.0-{name}" / "docs-0.jsonl.gz"]
    return CollectionFiles(name, corpus, parts["topics"], parts["qrels"])


def write_collection(
    folder: Path, name: str, passages: Iterable[tuple[str, str, str]], topics: Topics, qrels: Qrels, split: str = "dev"
) -> CollectionFiles:
    """Write a collection in MIRACL's layout below ``folder``; the same content gives the same bytes.

    Args:
        passages: docid, title and text of each.
    """
    files = written_files(folder, name, split)
    for path in (files.corpus[0], files.topics, files.qrels):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(files.corpus[0], "wb") as stream, gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
        for docid, title, text in passages:
            line = json.dumps({"docid": docid, "title": title, "text": text}, ensure_ascii=False)
            packed.write(line.encode() + b"\n")
    with atomic_open(files.topics) as stream:
        stream.writelines(f"{qid}\t{' '.join(query.split())}\n" for qid, query in topics.items())
    with atomic_open(files.qrels) as stream:
        for qid, judged in qrels.items():
            stream.writelines(f"{qid} Q0 {docid} {grade}\n" for docid, grade in judged.items())
    return files
