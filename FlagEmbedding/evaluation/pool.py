"""A labelled pool: of a corpus that is too large to be encoded again and again, the passages that tell models apart.

What is judged for the queries, what the untouched base finds best for them, and a random sample. Figures on it are
higher than those on the whole corpus, and are called pooled. It is written as a collection in MIRACL's layout, so that
steps 0 to 2 run on it as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.writing import write_collection
from FlagEmbedding.evaluation.live import DevCollection, Reading
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.utils.identity import as_json, digest, fingerprints
from FlagEmbedding.utils.io import read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main

logger = get_logger(__name__)


@dataclass(frozen=True)
class PoolSize:
    """What goes into a pool beside the judged passages.

    Attributes:
        mined: of each query, this many of the best that the base finds.
        random: passages of the rest, by ``seed``.
    """

    mined: int
    random: int
    seed: int


def pooled(source: Source, encoder: TextEncoder, reading: Reading, size: PoolSize, folder: Path, base: str) -> Source:
    """The pool of ``source`` below ``folder``: what lies there of the same inputs, or made now.

    Every process calls it, at the same time.

    Args:
        encoder: the base, by which passages are mined.
        base: says which base that is.
    """
    inputs = on_main(lambda: fingerprints(source.files()))
    identity = digest(base, as_json(asdict(reading)), as_json(asdict(size)), inputs)
    record = folder / f"{source.lang}.json"
    if on_main(lambda: record.is_file() and read_json(record)["identity"] == identity):
        return Source(source.lang, "dev", folder)
    logger.info("%s: the whole corpus goes through the base once, for the pool", source.lang)
    collection = DevCollection(source, encoder, reading)
    found = collection.search(encoder, size.mined) if size.mined else dict

    def write() -> Source:
        judged = {docid for own in collection.qrels.values() for docid in own}
        mined = {hit.docid for qid, hits in found().items() if qid in collection.qrels for hit in hits}
        rest = [docid for docid in collection.docids if docid not in judged | mined]
        drawn = random.Random(f"{size.seed}/pool {source.lang}").sample(rest, min(size.random, len(rest)))
        wanted = judged | mined | set(drawn)

        def passages() -> Iterator[tuple[str, str, str]]:
            for path in source.corpus():
                for passage in read_file(path):
                    if passage.docid in wanted:
                        yield passage.docid, passage.title, passage.text

        pool = write_collection(folder, source.lang, passages(), source.topics(), source.qrels())
        said = "%s: the pool holds %d of %d passages: %d judged, %d more mined, %d more at random"
        inside = wanted & set(collection.docids)
        counts = len(judged & inside), len(mined - judged), len(drawn)
        logger.info(said, source.lang, len(inside), collection.passages, *counts)
        write_json_atomic(record, {"identity": identity, "passages": len(inside)})
        return pool

    return on_main(write)
