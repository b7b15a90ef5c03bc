"""What each form of a checkpoint with experts costs: size, cosine, nDCG@10, time of a query; and each vector type.

    python benchmarks/exports_table.py CHECKPOINT --eval_data_dir DIR --eval_languages ko --output_dir OUT

Folds the checkpoint in three ways, writes the fold by load as ONNX in float32 and in 8 bits, searches its vectors as
float32, fp16, int8 and binary, and prints Markdown (also ``OUT/exports.md``). Every folder is made by the commands that
users have, and stays in OUT.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from FlagEmbedding.collections import miracl
from FlagEmbedding.collections.trec import read_qrels, read_topics
from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.evaluation.compare import score_run
from FlagEmbedding.evaluation.metrics import mean
from FlagEmbedding.evaluation.on_dev import MEASURES, NDCG
from FlagEmbedding.export.arguments import (
    FoldArguments,
    FoldOptions,
    OnnxArguments,
    OnnxOptions,
    SampleArguments,
    SourceArguments,
)
from FlagEmbedding.export.fold import fold
from FlagEmbedding.export.measure import Kind
from FlagEmbedding.export.measure import page as kinds_page
from FlagEmbedding.export.onnx import export
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.retrieval.approximate import SearchEffort, recall, search_approximate
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.searcher import search
from FlagEmbedding.utils.cli import entry_point, option, parse, positional
from FlagEmbedding.utils.pages import table
from FlagEmbedding.utils.provenance import provenance

HITS = 100
TYPES = (("fp16", 0), ("int8", 0), ("int8", 4), ("binary", 0), ("binary", 4), ("binary", 10))


@dataclass(frozen=True)
class TableArguments:
    """Checkpoint."""

    model: str = positional("checkpoint with experts", "MODEL", nargs=None)
    output_dir: str = option(help="exports and table")
    samples: int = option(200, "texts of the cosines and of the router's load: queries, and passages")


def exported(given: TableArguments, dev: DevArguments) -> list[Kind]:
    """The checkpoint, its folds, and the graphs of the fold by load, whose cosines are to that fold."""
    out, sample = Path(given.output_dir), SampleArguments(samples=given.samples)
    kinds: list[Kind] = []
    for method in ("average", "expert:0", "load"):
        place = SourceArguments(given.model, str(out / f"fold-{method.replace(':', '-')}"), overwrite=True)
        first = kinds[0] if kinds else None
        found = fold(FoldOptions(place, FoldArguments(method), sample, dev), first)
        kinds += found[1:] if kinds else found
    place = SourceArguments(str(out / "fold-load"), str(out / "onnx"), overwrite=True)
    kinds += export(OnnxOptions(place, OnnxArguments(int8=True), sample, dev), kinds[-1])[1:]
    return kinds


def vector_types(model: Path, dev: DevArguments) -> str:
    """Each vector type on the first language of ``dev``: bytes of a vector, share of the exact hits, nDCG@10."""
    lang = dev.eval_languages[0]
    topics = read_topics(miracl.topics_file(lang, dev.eval_split, dev.eval_data_dir))
    qrels = read_qrels(miracl.qrels_file(lang, dev.eval_split, dev.eval_data_dir))
    encoder = TextEncoder(EncoderArguments(encoder=str(model), device="cpu", workers=0))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        options = IndexArguments(max_passage_length=dev.eval_passage_length)
        build_index(encoder, miracl.corpus_files(lang, dev.eval_data_dir), Path(folder), lang, options)
        index = FlatIndex(folder)
        instruction = encoder.instruction("query", None)
        queries: np.ndarray = encode_texts(encoder, list(topics.values()), dev.eval_query_length, instruction)
        exact = search(index, queries, HITS)
        for kind, rescore in (("float32", 0), *TYPES):
            found = exact
            if kind != "float32":
                found, _ = search_approximate(index, queries, HITS, kind, effort=SearchEffort(rescore=rescore))
            run = {q: {hit.docid: hit.score for hit in hits} for q, hits in zip(topics, found, strict=True)}
            scores = score_run(qrels, run, MEASURES)
            size = {"float32": 32, "fp16": 16, "int8": 8, "binary": 1}[kind] * index.dimension // 8
            shares = [f"{100 * recall([h[:k] for h in found], [h[:k] for h in exact]):.1f}" for k in (10, HITS)]
            ndcg = f"{100 * mean(scores.values[NDCG.key]):.2f}"
            lines.append([kind, str(rescore or "–"), str(size), *shares, ndcg])
    headers = ["vectors", "rescored per hit", "bytes", "% of the exact top 10", f"of the top {HITS}", NDCG.label]
    return table(headers, lines, range(1, 6))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and print it."""
    given, dev = parse([TableArguments, DevArguments], argv, "A table of all forms of a checkpoint.")
    kinds = exported(given, dev)
    types = vector_types(Path(given.output_dir) / "fold-load", dev)
    record = provenance()
    page = f"{kinds_page(kinds)}\n\n{types}\n\n{record['platform']}, {record['versions']}, {asdict(dev)}\n"
    (Path(given.output_dir) / "exports.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    sys.exit(main())
