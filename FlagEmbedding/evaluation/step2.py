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
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import Qrels, Topics, find_qrels, qrels_names, read_qrels
from FlagEmbedding.evaluation.arguments import ScoreArguments
from FlagEmbedding.evaluation.compare import compare_runs, score_file
from FlagEmbedding.evaluation.metrics import Measure, parse_measures
from FlagEmbedding.evaluation.mode_table import write_mode_table
from FlagEmbedding.evaluation.report import Texts, score_table, write_comparison
from FlagEmbedding.evaluation.run_record import (
    Record,
    check_judged,
    check_record,
    read_record,
    run_file,
    run_origin,
    warn_of_different_conditions,
)  # fmt: skip
from FlagEmbedding.evaluation.systems import AVERAGE, System
from FlagEmbedding.retrieval.index import DOCID, index_name
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.modes import DENSE, Mode, parse_modes
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def score_models(arguments: ScoreArguments) -> None:
    """Result files and tables of every model, and with ``--compare`` their comparison.

    Raises:
        UserError: a run, qrels or measure that cannot be used; nothing has been written then.
    """
    languages = list(dict.fromkeys(arguments.languages))
    # Judgments of any collection may lie in --qrels_dir; where they do not, a name that MIRACL lacks is a mistake.
    if odd := [lang for lang in languages if not miracl.is_code(lang)]:
        miracl.check_languages(odd)
    measures = parse_measures(arguments.metrics)
    names = [index_name(encoder) for encoder in arguments.encoder]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--encoder: two models are called {name!r} and would share their runs; rename one")
    qrels = {lang: read_qrels(qrels_path(arguments, lang, len(languages) == 1), beir=None) for lang in languages}
    modes = parse_modes(arguments.modes)
    systems, records, encoders = [], [], []
    for encoder, name, mode in ((e, n, m) for e, n in zip(arguments.encoder, names, strict=True) for m in modes):
        paths = {lang: run_file(Path(arguments.search_result_save_dir) / name, mode, lang) for lang in languages}
        records.append({lang: _record(paths[lang], name, mode, qrels[lang], arguments) for lang in languages})
        sizes = {lang: run_origin(each)["corpus_passages"] for lang, each in records[-1].items()}
        scores = {lang: score_file(paths[lang], qrels[lang], measures, sizes[lang]) for lang in languages}
        systems.append(System(name if mode == DENSE else f"{name}/{mode.name}", scores))
        encoders.append(encoder)
    origin = {"arguments": asdict(arguments), "provenance": provenance()}
    names = [system.name for system in systems]
    runs = {
        name: {lang: run_origin(each) for lang, each in of.items()} for name, of in zip(names, records, strict=True)
    }
    for encoder, system, record in zip(encoders, systems, records, strict=True):
        made = {"model": encoder, **_settings(arguments, record)}
        path = _write(system, measures, arguments, made, {"runs": runs[system.name], **origin})
        if len(modes) == 1:
            print(f"{system.name} (scores × 100)\n\n{score_table([system], measures)}\n\n{path}\n")
    for place, encoder in enumerate(arguments.encoder if len(modes) > 1 else ()):
        own = systems[place * len(modes) : (place + 1) * len(modes)]
        pairs = [(0, later) for later in range(1, len(own))]
        tests = compare_runs(own, measures, pairs=pairs, resamples=arguments.resamples, seed=arguments.seed)
        path = Path(arguments.eval_result_save_dir) / index_name(encoder) / "modes.md"
        print(f"{encoder}\n\n{write_mode_table(path, modes, own, measures, tests, {'runs': runs, **origin})}\n")
    if arguments.compare:
        warn_of_different_conditions(names, records)
        comparisons = compare_runs(systems, measures, resamples=arguments.resamples, seed=arguments.seed)
        plain = [name.replace("/", "_") for name in names]
        others = "_".join(plain[1:]) if len("_vs_".join(plain)) <= 120 else f"{len(names) - 1}_others"
        folder = Path(arguments.eval_result_save_dir) / f"{plain[0]}_vs_{others}"
        if arguments.compare_save_dir:
            folder = Path(arguments.compare_save_dir)
        texts = _texts(arguments, qrels, records[0])
        print(write_comparison(folder, systems, measures, comparisons, texts, {"runs": runs, **origin}))


def qrels_path(arguments: ScoreArguments, lang: str, only_language: bool) -> Path:
    """The judgments of a language: from --qrels_dir, --data_dir or the hub; ``DataError`` where there are none."""
    for place in (arguments.qrels_dir, arguments.data_dir):
        found = find_qrels(place, lang, arguments.split, only_language) if place else None
        if found:
            return found
    names = qrels_names(lang, arguments.split)
    miracl.check_languages([lang], arguments.data_dir)
    if arguments.data_dir:
        source = Source(lang, arguments.split, arguments.data_dir, arguments.cache_dir, only_language)
        if source.beir is not None or lang not in miracl.LANGUAGES:
            return source.qrels_file()
    logger.info("%s: no qrels in %s: asking the hub", lang, arguments.qrels_dir)
    try:
        return miracl.qrels_file(lang, arguments.split, None, arguments.cache_dir)
    except DataError as error:
        raise DataError(
            f"--qrels_dir {arguments.qrels_dir}: no qrels of {lang}; expected {names[0]} (or {', '.join(names[1:3])}, "
            f"{', '.join(names[-3:])}) there, or the hub ({error})"
        ) from error


def _record(run: Path, name: str, mode: Mode, qrels: Qrels, arguments: ScoreArguments) -> Record:
    """Where a run came from, checked against what the command line says and what is judged."""
    path = run.with_suffix(".json")
    if not run.exists():
        by_mode = "" if mode == DENSE else f" --modes {mode.name}"
        raise DataError(
            f"{run}: no such run file; run step1-search_results.py --languages {path.stem}{by_mode} with this encoder"
        )
    given = arguments.index_save_dir
    index = None if given is None else _with_docids(Path(given) / name / path.stem, mode)
    record = read_record(path, index)
    check_record(record, path, arguments)
    searched = record.get("index", {}).get("folder")
    check_judged(qrels, index or (_with_docids(Path(searched), mode) if searched else None))
    return record


def _with_docids(folder: Path, mode: Mode) -> Path:
    """The folder of an index that names its passages: the dense one, or that of one of the mode's parts."""
    places = [folder, *(folder / part for part in mode.parts)]
    return next((place for place in places if (place / DOCID).is_file()), folder)


def _settings(arguments: ScoreArguments, records: dict[str, Record]) -> dict[str, Any]:
    """What the command line says of the encoder, else the runs' records, else what was the default."""
    said: dict[str, Any] = next((record["encoder"] for record in records.values() if record), {})
    normalize = arguments.normalize_embeddings
    return {
        "pooling_method": arguments.pooling_method or said.get("pooling", "cls"),
        "normalize_embeddings": said.get("normalize_embeddings", True) if normalize is None else normalize,
    }


def _write(
    system: System, measures: Sequence[Measure], arguments: ScoreArguments, made: dict[str, Any], origin: dict[str, Any]
) -> Path:
    """The published result file (values 0 to 1) with what it came from, and the table beside it."""
    path = Path(arguments.eval_result_save_dir) / f"{system.name}.json"
    value = {
        **made,
        "results": {lang: {m.key: system.mean(lang, m) for m in measures} for lang in [*system.languages, AVERAGE]},
        "queries": {lang: len(scores.first_relevant) for lang, scores in system.languages.items()},
        **origin,
    }
    try:
        write_json_atomic(path, value)
        with atomic_open(path.with_suffix(".md")) as stream:
            stream.write(f"# {system.name}\n\n{score_table([system], measures)}\n\nScores × 100.\n")
    except OSError as error:
        raise DataError(f"{path}: the results cannot be written there: {error.strerror}") from error
    return path


def _texts(arguments: ScoreArguments, qrels: dict[str, Qrels], records: dict[str, Record]) -> Texts:
    """Texts of queries and passages, from a folder known to hold them: given, recorded by step 1, or the qrels'."""
    queries, folders = dict[str, Topics](), dict[str, Source]()
    for lang in qrels:
        recorded = records[lang].get("arguments", {}).get("data_dir")
        for place in (arguments.data_dir, recorded, arguments.qrels_dir):
            if lang in folders or not place:
                continue
            source = Source(lang, arguments.split, place, only_language=len(qrels) == 1)
            if source.beir is not None or (Path(place) / f"miracl-v1.0-{lang}").is_dir():
                queries[lang], folders[lang] = source.topics(), source
    bare = [lang for lang in qrels if lang not in folders]
    if bare:
        logger.info("%s: no folder with their queries is known (--data_dir): tables show ids only", " ".join(bare))

    def passages(lang: str, wanted: set[str]) -> dict[str, str]:
        source = folders.get(lang)
        if not wanted or source is None:
            return {}
        place = Path(source.data_dir or "") / f"miracl-corpus-v1.0-{lang}"
        files = source.corpus() if source.beir is not None or place.is_dir() else []
        return {p.docid: p.text for path in files for p in corpus.read_file(path) if p.docid in wanted}

    return Texts(queries, qrels, passages if folders else None)
