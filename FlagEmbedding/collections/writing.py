"""Writing a small collection in MIRACL's layout."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import Qrels, Topics
from FlagEmbedding.utils.io import atomic_open


def write_collection(
    folder: Path, name: str, passages: Iterable[tuple[str, str, str]], topics: Topics, qrels: Qrels, split: str = "dev"
) -> Source:
    """Write a collection in MIRACL's layout below ``folder``; the same content gives the same bytes.

    Args:
        passages: docid, title and text of each.
    """
    write_corpus(folder, name, passages)
    write_judgments(folder, name, topics, qrels, split)
    return Source(name, split, folder)


def write_corpus(folder: Path, name: str, passages: Iterable[tuple[str, str, str]]) -> Path:
    """The corpus of such a collection; returns its file."""
    corpus = folder / f"miracl-corpus-v1.0-{name}" / "docs-0.jsonl.gz"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(corpus, "wb") as stream, gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
        for docid, title, text in passages:
            line = json.dumps({"docid": docid, "title": title, "text": text}, ensure_ascii=False)
            packed.write(line.encode() + b"\n")
    return corpus


def write_judgments(folder: Path, name: str, topics: Topics, qrels: Qrels, split: str = "dev") -> None:
    """The queries of a split and their judgments."""
    parts = {
        kind: folder / f"miracl-v1.0-{name}" / kind / f"{kind}.miracl-v1.0-{name}-{split}.tsv"
        for kind in ("topics", "qrels")
    }
    for path in parts.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(parts["topics"]) as stream:
        stream.writelines(f"{qid}\t{' '.join(query.split())}\n" for qid, query in topics.items())
    with atomic_open(parts["qrels"]) as stream:
        for qid, judged in qrels.items():
            stream.writelines(f"{qid} Q0 {docid} {grade}\n" for docid, grade in judged.items())
