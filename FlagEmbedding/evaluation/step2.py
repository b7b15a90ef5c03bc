"""Step 2: scores of the runs that step 1 wrote, as JSON with provenance and as a table; comparison of models.

A missing or broken file, an unknown measure, a run of other queries or one made under other flags ends the step
before anything is written: there is never an empty score. The run's record (``{lang}.json``, written by step 1) says
which model, index and title rule it came from; a run without one is scored all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FlagEmbedding.collections import corpus, miracl
from FlagEmbedding.collections.trec import Qrels, find_qrels, qrels_names, read_qrels, read_run, read_topics
from FlagEmbedding.evaluation.arguments import ScoreArguments
from FlagEmbedding.evaluation.compare import compare_runs, score_run
from FlagEmbedding.evaluation.metrics import Measure, parse_measures, run_depth
from FlagEmbedding.evaluation.report import Texts, score_table, write_comparison
from FlagEmbedding.evaluation.run_record import check_record, read_record, run_origin, warn_of_different_conditions
from FlagEmbedding.evaluation.systems import AVERAGE, LanguageScores, System
from FlagEmbedding.retrieval.index import index_name
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def score_models(arguments: ScoreArguments) -> None:
    """Result files and tables of every model, and with ``--compare`` their comparison.

    Raises:
        UserError: a run, qrels or measure that cannot be used; nothing has been written then.
    """
    languages = miracl.check_languages(arguments.languages)
    measures = parse_measures(arguments.metrics)
    names = [index_name(encoder) for encoder in arguments.encoder]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--encoder: two models are called {name!r} and would share their runs; rename one")
    qrels = {lang: read_qrels(qrels_path(arguments, lang, len(languages) == 1)) for lang in languages}
    systems, records = [], []
    for name in names:
        folder = Path(arguments.search_result_save_dir) / name
        records.append({lang: _record(folder, lang, name, arguments) for lang in languages})
        systems.append(System(name, {lang: _score(folder, lang, qrels[lang], measures) for lang in languages}))
    origin = {"arguments": asdict(arguments), "provenance": provenance()}
    for encoder, system, record in zip(arguments.encoder, systems, records, strict=True):
        path = _write(encoder, system, measures, record, arguments, origin)
        print(f"{system.name} (scores × 100)\n\n{score_table([system], measures)}\n\n{path}\n")
    if arguments.compare:
        warn_of_different_conditions(names, records)
        comparisons = compare_runs(systems, measures, resamples=arguments.resamples, seed=arguments.seed)
        texts = _texts(arguments, languages, qrels, records[0])
        folder = Path(arguments.compare_save_dir or Path(arguments.eval_result_save_dir) / _pair_name(names))
        runs = {
            name: {lang: run_origin(found) for lang, found in record.items()}
            for name, record in zip(names, records, strict=True)
        }
        print(write_comparison(folder, systems, measures, comparisons, texts, {"runs": runs, **origin}))


def qrels_path(arguments: ScoreArguments, lang: str, only_language: bool) -> Path:
    """The judgements of a language: from --qrels_dir, --data_dir or the hub; ``DataError`` where there are none."""
    for place in (arguments.qrels_dir, arguments.data_dir):
        found = find_qrels(place, lang, arguments.split, only_language) if place else None
        if found:
            return found
    names = qrels_names(lang, arguments.split)
    logger.info("%s: no qrels in %s: asking the hub", lang, arguments.qrels_dir)
    try:
        return miracl.qrels_file(lang, arguments.split, None, arguments.cache_dir)
    except DataError as error:
        raise DataError(
            f"--qrels_dir {arguments.qrels_dir}: no qrels of {lang}; expected {names[0]} (or {', '.join(names[1:3])}, "
            f"{', '.join(names[-3:])}) there, or the hub ({error})"
        ) from error


def _score(folder: Path, lang: str, qrels: Qrels, measures: Sequence[Measure]) -> LanguageScores:
    path = folder / f"{lang}.txt"
    if not path.exists():
        raise DataError(f"{path}: no such run file; run step1-search_results.py --languages {lang} with this encoder")
    run = read_run(path)
    try:
        scores = score_run(qrels, run, measures)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    absent = len(qrels.keys() - run.keys())
    if absent:
        logger.warning("%s: %d of %d judged queries have no results and count as 0", path, absent, len(qrels))
    depth = run_depth(run)
    for measure in measures:
        if measure.cutoff is not None and measure.cutoff > depth:
            logger.warning("%s: %s on a run that is %d deep; give step 1 more --hits", path, measure.label, depth)
    return scores


def _record(folder: Path, lang: str, name: str, arguments: ScoreArguments) -> dict[str, Any]:
    """Where a run came from, checked against what the command line says."""
    index = None if arguments.index_save_dir is None else Path(arguments.index_save_dir) / name / lang
    path = folder / f"{lang}.json"
    record = read_record(path, index)
    check_record(record, path, arguments.pooling_method, arguments.normalize_embeddings, arguments.split)
    return record


def _write(
    encoder: str,
    system: System,
    measures: Sequence[Measure],
    records: dict[str, dict[str, Any]],
    arguments: ScoreArguments,
    origin: dict[str, Any],
) -> Path:
    """The published result file (values 0 to 1) with what it came from, and the table beside it."""
    said: dict[str, Any] = next((record["encoder"] for record in records.values() if record), {})
    normalize = arguments.normalize_embeddings
    languages = list(system.languages)
    results = {lang: {m.key: system.mean(lang, m) for m in measures} for lang in [*languages, AVERAGE]}
    path = Path(arguments.eval_result_save_dir) / f"{system.name}.json"
    value = {
        "model": encoder,
        "pooling_method": arguments.pooling_method or said.get("pooling", "cls"),
        "normalize_embeddings": said.get("normalize_embeddings", True) if normalize is None else normalize,
        "results": results,
        "queries": {lang: len(scores.first_relevant) for lang, scores in system.languages.items()},
        "runs": {lang: run_origin(record) for lang, record in records.items()},
        **origin,
    }
    try:
        write_json_atomic(path, value)
        with atomic_open(path.with_suffix(".md")) as stream:
            stream.write(f"# {system.name}\n\n{score_table([system], measures)}\n\nScores × 100.\n")
    except OSError as error:
        raise DataError(f"{path}: the results cannot be written there: {error.strerror}") from error
    return path


def _pair_name(names: list[str]) -> str:
    name = f"{names[0]}_vs_{'_'.join(names[1:])}"
    return name if len(name) <= 120 else f"{names[0]}_vs_{len(names) - 1}_others"


def _texts(
    arguments: ScoreArguments, languages: list[str], qrels: dict[str, Qrels], records: dict[str, dict[str, Any]]
) -> Texts:
    """Texts of queries and passages, from a folder known to hold them: given, recorded by step 1, or the qrels'."""
    queries, folders = {}, {}
    for lang in languages:
        recorded = records[lang].get("arguments", {}).get("data_dir")
        places = [Path(place) for place in (arguments.data_dir, recorded, arguments.qrels_dir) if place]
        for place in places:
            if place.is_dir() and (place / f"miracl-v1.0-{lang}").is_dir():
                queries[lang] = read_topics(miracl.topics_file(lang, arguments.split, place))
                folders[lang] = place
                break

    bare = [lang for lang in languages if lang not in queries]
    if bare:
        logger.info("%s: no folder with their queries is known (--data_dir): tables show ids only", " ".join(bare))

    def passages(lang: str, wanted: set[str]) -> dict[str, str]:
        if lang not in folders or not (folders[lang] / f"miracl-corpus-v1.0-{lang}").is_dir():
            return {}
        files = miracl.corpus_files(lang, folders[lang])
        return {p.docid: p.text for path in files for p in corpus.read_file(path) if p.docid in wanted}

    return Texts(queries, qrels, passages if folders else None)
