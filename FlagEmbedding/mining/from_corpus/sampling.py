"""Which passages get queries: drawn by a seed from those that may, part of them for dev.

A draw depends on texts and seed alone: the order of the corpus, its files and its ids do not matter, and a larger
``--passages`` holds the smaller one. Passages of dev are told apart by text, so that a copy of one under another id is
not trained on either.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from FlagEmbedding.collections.beir import CORPUS, QUERIES, beir_file, beir_folder
from FlagEmbedding.collections.corpus import passage_text, read_file
from FlagEmbedding.mining.common.passages import corpus_files
from FlagEmbedding.mining.common.rows import KeySet
from FlagEmbedding.mining.from_corpus.arguments import DocumentArguments
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.texts import is_blank, text_key

LEFT_OUT = ("empty", "too short", "too long", "repeated")


@dataclass(frozen=True)
class Drawn:
    """A passage that gets queries; ``key`` is its :func:`text_key`."""

    docid: str
    text: str
    key: bytes
    dev: bool


def given_files(paths: Sequence[str], work: Path) -> list[Path]:
    """The corpus files in MIRACL's form; of a BEIR folder its corpus alone. Raises ``DataError``."""
    return corpus_files([_beir_corpus(name) or name for name in paths], work)


def _beir_corpus(name: str) -> Path | None:
    folder = beir_folder(name, "")
    queries = folder and any((folder / f"{QUERIES}{packed}").is_file() for packed in ("", ".gz"))
    return beir_file(folder, CORPUS) if folder and queries else None


def draw(files: Sequence[Path], with_title: bool, a: DocumentArguments, seed: int) -> tuple[list[Drawn], Counter[str]]:
    """The passages in the order of the corpus, and how many there were of which kind. Memory: those drawn, and keys.

    Raises:
        DataError: none may have a query, or none would be left for training.
    """
    counts, seen = Counter[str](), KeySet()

    def candidates() -> Iterator[tuple[str, int, str, str, bytes]]:
        for path in files:
            for passage in read_file(path):
                counts["passages"] += 1
                text = passage_text(passage, with_title)
                reason = _left_out(text, a)
                if reason is None and not seen.add(key := text_key(text)):
                    reason = "repeated"
                if reason is not None:
                    counts[reason] += 1
                else:
                    yield digest(seed, key.hex()), counts["passages"], passage.docid, text, key

    chosen = heapq.nsmallest(a.passages, candidates())
    dev = max(1, round(len(chosen) * a.dev_share)) if a.dev_share else 0
    if len(chosen) <= dev:
        why = ", ".join(f"{counts[name]} {name}" for name in LEFT_OUT if counts[name]) or "none left out"
        raise DataError(
            f"{files[0]}: {len(chosen)} of {counts['passages']} passages may have queries ({why}), {dev} of them for "
            "dev; at least one must be left for training: see to --min_passage_characters, or give more documents"
        )
    counts |= {"drawn": len(chosen), "dev": dev}
    drawn = [(place, Drawn(docid, text, key, rank < dev)) for rank, (_, place, docid, text, key) in enumerate(chosen)]
    return [passage for _, passage in sorted(drawn, key=lambda entry: entry[0])], counts


def _left_out(text: str, a: DocumentArguments) -> str | None:
    if is_blank(text):
        return "empty"
    if len(text) < a.min_passage_characters:
        return "too short"
    return "too long" if len(text) > a.max_passage_characters else None
