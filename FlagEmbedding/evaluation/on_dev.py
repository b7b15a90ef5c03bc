"""Measures of a checkpoint on a dev collection, and its comparison with others.

The figures are those of steps 0 to 2 with their default flags; see :mod:`evaluation.live`.
"""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.evaluation.compare import compare_runs
from FlagEmbedding.evaluation.live import DevCollection, Reading
from FlagEmbedding.evaluation.metrics import Measure, parse_measures
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, LanguageScores, System
from FlagEmbedding.inference.text_encoder import TextEncoder

MEASURES = parse_measures(["ndcg@10", "recall@100"])
NDCG = MEASURES[0]


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
    query, passage = map(encoder.max_length, (dev.eval_query_length, dev.eval_passage_length))
    reading = Reading(
        query,
        passage,
        query_instruction=dev.query_instruction_for_retrieval,
        passage_instruction=dev.passage_instruction_for_retrieval,
    )
    return DevCollection(source, encoder, reading).score(encoder, MEASURES)[0]


def overall(system: System, measure: Measure = NDCG) -> float:
    """The mean over languages, 0 to 1."""
    return system.mean(AVERAGE, measure)


def against_first(systems: Sequence[System]) -> list[Comparison]:
    """Each later system against the first one, nDCG@10 over all languages: difference, 95 % interval, p."""
    pairs = [(0, place) for place in range(1, len(systems))]
    lines = compare_runs(systems, [NDCG], pairs=pairs) if pairs else []
    return [line for line in lines if line.language == systems[0].shown[-1]]
