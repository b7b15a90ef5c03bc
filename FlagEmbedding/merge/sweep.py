"""What the command does: candidates by their weights, each written, loaded and measured as it would be used."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from FlagEmbedding.evaluation.on_dev import MEASURES, NDCG, against_first, check_collection, overall, score_on_dev
from FlagEmbedding.evaluation.systems import System
from FlagEmbedding.evaluation.tables import p_text, points, signed_points
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.merge.arguments import MergeOptions
from FlagEmbedding.merge.build import merge, write
from FlagEmbedding.merge.sources import Source, open_sources
from FlagEmbedding.utils.folders import check_new_folder, new_folder, write_record
from FlagEmbedding.utils.identity import model_fingerprint
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import table
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)
RECORD = "merge.json"


@dataclass(frozen=True)
class Outcome:
    """What was written, and what was measured on the way (nothing without a dev collection)."""

    weights: list[float]
    systems: list[System]
    tried: list[list[float]]


def candidates(models: int, sweep: Sequence[float]) -> list[list[float]]:
    """The weights to try: the tuned models share each of ``sweep`` equally; base and tuned ones are always there."""
    tuned = models - 1
    found = [[1 - share, *[share / tuned] * tuned] for share in sorted({0.0, 1.0, *sweep})]
    if tuned > 1:
        found += [[float(place == alone) for place in range(models)] for alone in range(1, models)]
    return found


def run(options: MergeOptions) -> Outcome:
    """Merge, measure where a dev collection is given, and write the checkpoint.

    Raises:
        UserError: checkpoints that cannot be averaged, a folder in the way, a collection that cannot be read.
    """
    given, dev = options.merge, options.dev
    check_new_folder(given.output_dir, RECORD, given.overwrite)
    if dev.eval_data_dir:
        check_collection(dev)
    sources = open_sources(given.models, given.cache_dir)
    tried = candidates(len(sources), given.sweep) if given.sweep else [given.shares]
    if dev.eval_data_dir and not given.sweep:
        tried = [weights for weights in candidates(len(sources), ()) if weights != given.shares]
        tried.append(given.shares)
    with new_folder(given.output_dir, RECORD, given.overwrite) as draft:
        systems: list[System] = []
        kept = given.shares
        for weights in tried if dev.eval_data_dir else ():
            folder = draft.with_name("candidate")
            write(merge(sources, weights, given.method), sources, folder)
            encoder = TextEncoder(EncoderArguments(encoder=str(folder), workers=0))
            systems.append(score_on_dev(name_of(weights), encoder, dev))
            logger.info("weights %s: nDCG@10 %s", systems[-1].name, points(overall(systems[-1])))
            if given.sweep and overall(systems[-1]) > max(map(overall, systems[:-1]), default=-1.0):
                kept = weights
                shutil.rmtree(draft)
                folder.rename(draft)
            else:
                shutil.rmtree(folder)
        if not given.sweep:
            write(merge(sources, kept, given.method), sources, draft)
        _record(draft, options, sources, kept, systems)
    return Outcome(kept, systems, tried)


def name_of(weights: Sequence[float]) -> str:
    """``0.5 : 0.5``."""
    return " : ".join(f"{weight:.4g}" for weight in weights)


def _record(
    folder: Path, options: MergeOptions, sources: Sequence[Source], weights: Sequence[float], systems: Sequence[System]
) -> None:
    value: dict[str, Any] = {
        "models": [
            {"name": source.name, "sha256": model_fingerprint(source.folder), "weight": weight}
            for source, weight in zip(sources, weights, strict=True)
        ],
        "method": options.merge.method,
        "dev": asdict(options.dev) if systems else None,
        "tried": {each.name: {m.key: overall(each, m) for m in MEASURES} for each in systems},
        "provenance": provenance(),
    }
    write_record(folder, RECORD, value)


def page(outcome: Outcome) -> str:
    """The candidates as a table, scores × 100, differences from the first of them (the base)."""
    base, kept = outcome.systems[0], name_of(outcome.weights)
    shown = base.shown
    headers = ["weights", "", *(f"{NDCG.label} {lang}" for lang in shown), MEASURES[1].label]
    headers += ["from base", "95 % interval", "p"]
    tests: list[Any] = [None, *against_first(outcome.systems)]
    lines = []
    for system, test in zip(outcome.systems, tests, strict=True):
        line = [system.name, "written" if system.name == kept else ""]
        line += [*(points(system.mean(lang, NDCG)) for lang in shown), points(overall(system, MEASURES[1]))]
        if test is None:
            line += ["", "", ""]
        else:
            interval = f"{signed_points(test.low)} to {signed_points(test.high)}"
            line += [signed_points(test.difference), interval, p_text(test.p_value)]
        lines.append(line)
    return table(headers, lines, range(2, len(headers)))
