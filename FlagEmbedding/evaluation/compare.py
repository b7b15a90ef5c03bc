"""Two or more systems on the same queries: means, differences, intervals, p-values.

The command compares run files of any system; step 2 with ``--compare`` does it for models and languages by name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np

from FlagEmbedding.collections.trec import Qrels, Run, ranking, read_qrels, read_run, read_topics
from FlagEmbedding.evaluation.arguments import RESAMPLES, CompareArguments
from FlagEmbedding.evaluation.metrics import Measure, evaluate, parse_measures
from FlagEmbedding.evaluation.report import Texts, write_comparison
from FlagEmbedding.evaluation.significance import bootstrap_interval, holm, randomization_p
from FlagEmbedding.evaluation.systems import AVERAGE, Comparison, LanguageScores, System
from FlagEmbedding.utils.cli import entry_point, parse
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def score_run(qrels: Qrels, run: Run, measures: Sequence[Measure]) -> LanguageScores:
    """Measures of every judged query, with what a reader of single queries wants to know."""
    first: dict[str, int | None] = {}
    top: dict[str, str | None] = {}
    for qid, judged in qrels.items():
        order = ranking(run.get(qid, {}))
        top[qid] = order[0] if order else None
        first[qid] = next((place for place, docid in enumerate(order, 1) if judged.get(docid, 0) > 0), None)
    return LanguageScores(evaluate(qrels, run, measures), first, top)


def score_file(path: PathLike, qrels: Qrels, measures: Sequence[Measure], passages: int | None = 0) -> LanguageScores:
    """A run file's scores, with a line in the log for what a reader of the scores should know.

    Args:
        passages: in the index that step 1 searched; None: not known, 0: nothing is said of the run's depth.

    Raises:
        DataError: a run that cannot be read, or is of other queries.
    """
    run = read_run(path)
    try:
        scores = score_run(qrels, run, measures)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    absent = len(qrels.keys() - run.keys())
    if absent:
        logger.warning("%s: %d of %d judged queries have no results and count as 0", path, absent, len(qrels))
    if not any(scores.first_relevant.values()):
        logger.warning("%s: no relevant passage of any query is in it: are these the judgments of its corpus?", path)
    depth = max(map(len, run.values()))
    hint = "give step 1 more --hits" + (", if its corpus has more passages" if passages is None else "")
    for measure in measures:
        if measure.cutoff is not None and depth < min(measure.cutoff, sys.maxsize if passages is None else passages):
            logger.warning("%s: %s on a run that is %d deep; %s", path, measure.label, depth, hint)
    return scores


def compare_runs(
    systems: Sequence[System],
    measures: Sequence[Measure],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Test pairs of systems on every language and, with several, on their average; Holm over all tests together.

    Args:
        pairs: places in ``systems``, (baseline, system); None: every system against every earlier one.

    Raises:
        DataError: two systems do not have the same judged queries.
    """
    pairs = list(combinations(range(len(systems)), 2)) if pairs is None else pairs
    for system in systems[1:]:
        _check_same_queries(systems[0], system)
    tests = product([(systems[a], systems[b]) for a, b in pairs], systems[0].shown, measures)
    results = [_test(*pair, lang, measure, resamples, seed) for pair, lang, measure in tests]
    corrected = holm([found.p_value for found in results])
    return [replace(found, p_holm=p) for found, p in zip(results, corrected, strict=True)]


def _test(base: System, system: System, lang: str, measure: Measure, resamples: int, seed: int) -> Comparison:
    """One comparison, not yet corrected for the others."""
    parts = []
    for each in base.languages if lang == AVERAGE else [lang]:
        before, after = (of.languages[each].values[measure.key] for of in (base, system))
        parts.append(np.array([after[qid] - value for qid, value in before.items()]))  # in qrels order
    every = np.concatenate(parts)
    low, high = bootstrap_interval(parts, resamples, seed)
    p = randomization_p(parts, resamples, seed)
    return Comparison(
        baseline=base.name, system=system.name, language=lang, measure=measure.key, queries=len(every),
        baseline_mean=base.mean(lang, measure), system_mean=system.mean(lang, measure),
        difference=float(np.mean([part.mean() for part in parts])), low=low, high=high, p_value=p, p_holm=p,
        better=int((every > 0).sum()), worse=int((every < 0).sum()), equal=int((every == 0).sum()),
    )  # fmt: skip


def _check_same_queries(one: System, other: System) -> None:
    for lang, scores in one.languages.items():
        if lang not in other.languages:
            raise DataError(f"{other.name} has no scores for {lang}, {one.name} has: compare on common languages")
        for key, values in scores.values.items():
            if values.keys() != other.languages[lang].values[key].keys():
                raise DataError(f"{one.name} and {other.name} were scored on different queries of {lang}")


def unique_names(places: Sequence[str]) -> list[str]:
    """Short names for run files: file stems, or whole paths where stems repeat."""
    stems = [Path(place).name.removesuffix(".gz").removesuffix(".txt").removesuffix(".trec") for place in places]
    return stems if len(set(stems)) == len(stems) else list(places)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Compare run files of one query set."""
    what = "Compare two or more TREC run files on the same queries; the first one is the baseline."
    arguments: CompareArguments = parse([CompareArguments], argv, what)[0]
    names, lang = arguments.names or unique_names(arguments.runs), arguments.language
    if len(arguments.runs) < 2 or len(names) != len(arguments.runs) or len(set(names)) != len(names):
        raise UsageError("give two or more runs, and as many different --names")
    measures = parse_measures(arguments.metrics)
    qrels = read_qrels(arguments.qrels, beir=None)
    systems = [
        System(name, {lang: score_file(path, qrels, measures)})
        for name, path in zip(names, arguments.runs, strict=True)
    ]
    comparisons = compare_runs(systems, measures, resamples=arguments.resamples, seed=arguments.seed)
    texts = Texts({lang: read_topics(arguments.topics)} if arguments.topics else {}, {lang: qrels})
    record = {"arguments": asdict(arguments), "provenance": provenance()}
    print(write_comparison(arguments.output_dir, systems, measures, comparisons, texts, record))


if __name__ == "__main__":
    sys.exit(main())
