"""Measures of an encoder on a dev collection: steps 0, 1 and 2 in one go, by their own code, with no file left.

The figures are those of the steps with their default flags: the same index, the same exact search, the same measures.
The index lies in a temporary folder while it is searched (``TMPDIR`` says where), twice the size of the vectors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.evaluation.compare import compare_runs, score_run
from FlagEmbedding.evaluation.metrics import Measure, parse_measures
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, LanguageScores, System
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.retrieval.index import FlatIndex

HITS = 100
NDCG, RECALL = MEASURES = parse_measures(["ndcg@10", f"recall@{HITS}"])


def check_collection(dev: DevArguments) -> None:
    """Find the collection's files, before any work is spent. Raises ``UserError`` for what is missing."""
    for source in _sources(dev).values():
        source.files()


def _sources(dev: DevArguments) -> dict[str, Source]:
    return sources(dev.eval_languages, dev.eval_split, dev.eval_data_dir)


def score_on_dev(name: str, encoder: TextEncoder, dev: DevArguments) -> System:
    """nDCG@10 and Recall@100 of every judged query of ``dev``, under the name ``name``."""
    return System(name, {lang: _score(encoder, dev, source) for lang, source in _sources(dev).items()})


def _score(encoder: TextEncoder, dev: DevArguments, source: Source) -> LanguageScores:
    topics, qrels = source.topics(), source.qrels()
    options = IndexArguments(
        max_passage_length=dev.eval_passage_length,
        passage_instruction_for_retrieval=dev.passage_instruction_for_retrieval,
    )
    with tempfile.TemporaryDirectory(prefix="dev-index-") as folder:
        build_index(encoder, source.corpus(), Path(folder), source.lang, options)
        retriever = Retriever(
            encoder,
            FlatIndex(folder),
            query_length=dev.eval_query_length,
            query_instruction=encoder.instruction("query", dev.query_instruction_for_retrieval),
        )
        hits = retriever.search(retriever.embed_queries(list(topics.values())), HITS)
    run = {qid: {hit.docid: hit.score for hit in found} for qid, found in zip(topics, hits, strict=True)}
    return score_run(qrels, run, MEASURES)


def overall(system: System, measure: Measure = NDCG) -> float:
    """The mean over languages, 0 to 1."""
    return system.mean(AVERAGE, measure)


def against_first(systems: Sequence[System]) -> list[Comparison]:
    """Each later system against the first one, nDCG@10 over all languages: difference, 95 % interval, p."""
    pairs = [(0, place) for place in range(1, len(systems))]
    lines = compare_runs(systems, [NDCG], pairs=pairs) if pairs else []
    return [line for line in lines if line.language == systems[0].shown[-1]]
