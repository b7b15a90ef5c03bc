"""What a run evaluates on while it trains, and the figures of it: for the log, for a reader, for single queries.

In ``output_dir/dev``: ``step-N.json``, each evaluation's values of every query; a pool or the held-out rows as a
collection in MIRACL's layout.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from FlagEmbedding.collections.source import Source, sources
from FlagEmbedding.evaluation.live import DevCollection, Evaluated, Reading, score_model
from FlagEmbedding.evaluation.pool import PoolSize, pooled
from FlagEmbedding.evaluation.systems import AVERAGE, LanguageScores, System
from FlagEmbedding.evaluation.tables import points, signed_points
from FlagEmbedding.evaluation.widths import score_widths
from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.dev.arguments import under_our_names
from FlagEmbedding.finetune.dev.held_out import hold_out
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.live_encoder import LiveEncoder
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import digest, model_fingerprint
from FlagEmbedding.utils.io import read_json, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.randomness import untouched_randomness

logger = get_logger(__name__)

FOLDER, BASE = "dev", "base"


def dev_evaluation(arguments: Arguments, dataset: TrainDataset) -> DevEvaluation:
    """What ``arguments`` evaluate on; rows to hold out are taken out of ``dataset``. Raises ``UserError``."""
    held = None
    if arguments.evaluation.eval_rows is not None:
        folder = Path(str(arguments.training.output_dir)) / FOLDER / "held_out"
        held = hold_out(dataset, arguments.evaluation, folder)
    return DevEvaluation(arguments, held)


class DevEvaluation:
    """The dev queries of a run and their passages, tokenized once; a model is measured on them again and again.

    Args:
        arguments: of the run.
        held: the rows that were held out, as a collection, where there are any.

    Attributes:
        files: the collections, found when this is made: what is missing is refused before the model is loaded.
        collections: the same, tokenized, from :meth:`prepare` on.
        base: the untouched base's scores.
    """

    def __init__(self, arguments: Arguments, held: Source | None) -> None:
        self.options, self.dtype = arguments.evaluation, arguments.training.dtype_name
        self.seed, self.source = arguments.training.sampling_seed, arguments.model.model_name_or_path
        self.cache_dir = arguments.model.cache_dir
        self.folder = Path(str(arguments.training.output_dir)) / FOLDER
        self.measures, self.best = self.options.measures, str(arguments.training.metric_for_best_model)
        self.modes = self.options.other_modes
        self.files = [held] if held else on_main(lambda: under_our_names(self._find))
        self.collections: list[DevCollection] = []
        self.base: Evaluated | None = None
        self._seconds = 0.0
        self.by_width: list[dict[int, System]] = []  # of the base, and of what the run left (``--matryoshka_dims``)

    def _find(self) -> list[Source]:
        options = self.options
        found = [*sources(options.eval_languages, options.eval_split, options.eval_data_dir).values()]
        for source in found:
            source.files()  # what is missing is refused now
        return found

    @property
    def base_folder(self) -> Path:
        """Where the base's weights lie while it may be the best."""
        return self.folder / BASE

    @property
    def main_key(self) -> str:
        """Log key of the measure that decides what is best."""
        return f"eval_{self.best}"

    def prepare(self, model: BiEncoder, fresh: bool = True) -> None:
        """Read and tokenize the collections, and measure ``model``, the untouched base. Called by all processes.

        Args:
            fresh: the run begins now: nothing that an older one kept stays.
        """
        with untouched_randomness():
            encoder = self._encoder(model)
            query, passage = map(encoder.max_length, (self.options.eval_query_length, self.options.eval_passage_length))
            reading = Reading(query, passage, self.options.eval_with_title)
            files = self.files
            if self.options.eval_corpus == "pool" and self.options.eval_data_dir:
                size = PoolSize(self.options.eval_pool_mined, self.options.eval_pool_random, self.seed)
                base = digest(self._base_weights(), self.dtype, model.pooling, asdict(model.instructions))
                files = [pooled(each, encoder, reading, size, self.folder / "pool", base) for each in files]
            self.collections = [DevCollection(each, encoder, reading) for each in files]
            started = time.monotonic()
            self.base = score_model(BASE, encoder, self.collections, self.measures, self.modes)
            self._seconds = time.monotonic() - started
        self.measure_widths(model)
        if is_main():
            for old in self.folder.glob("step-*.json") if fresh else ():
                old.unlink()
            self._keep(self.base, 0)
        passages, queries = (sum(getattr(each, n) for each in self.collections) for n in ("passages", "queries"))
        said = "evaluation while training: %d queries over %s%d passages, %.1f s each time"
        logger.info(said, queries, "a pool of " if self.options.pool else "", passages, self._seconds)

    def _base_weights(self) -> str:
        folder = resolve_folder(self.source, cache_dir=self.cache_dir)
        return on_main(lambda: model_fingerprint(str(folder)))

    def measure(self, model: BiEncoder, step: int) -> dict[str, float]:
        """Measure ``model`` at ``step`` (0: the base, which :meth:`prepare` has measured): figures by log key."""
        assert self.base is not None
        evaluated = self.base
        if step:
            started = time.monotonic()
            with untouched_randomness():
                encoder = self._encoder(model)
                evaluated = score_model(f"step {step}", encoder, self.collections, self.measures, self.modes)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._seconds = time.monotonic() - started
        system = evaluated.system
        if is_main():
            if step:
                self._keep(evaluated, step)
            logger.info("%s", self._line(system, step))
            if self.modes:
                logger.info("%s", self._mode_line(evaluated))
        prefix = f"eval_{self.options.prefix}"
        figures = {f"{prefix}{m.key}": system.mean(AVERAGE, m) for m in self.measures}
        for lang in system.languages if self.options.eval_data_dir else ():
            figures |= {f"{prefix}{lang}_{m.key}": system.mean(lang, m) for m in self.measures}
        for mode, own in evaluated.modes.items():
            figures |= {f"{prefix}{mode}_{m.key}": own.mean(AVERAGE, m) for m in self.measures}
            for lang in own.languages if self.options.eval_data_dir else ():
                figures |= {f"{prefix}{lang}_{mode}_{m.key}": own.mean(lang, m) for m in self.measures}
        return figures | {"eval_seconds": round(self._seconds, 3)}

    def measure_widths(self, model: BiEncoder) -> None:
        """Note the measures of ``model`` at each width that is trained; called by all processes."""
        if model.widths is None:
            return
        with untouched_randomness():
            self.by_width.append(score_widths(self._encoder(model), self.collections, self.measures, model.widths.dims))

    def _encoder(self, model: BiEncoder) -> LiveEncoder:
        options = EncoderArguments(
            encoder=self.source,
            pooling_method=None,
            normalize_embeddings=model.normalize,
            dtype=self.dtype,
            heads=bool(self.modes),
        )
        return LiveEncoder(model, model.tokenizer, options)

    def _line(self, system: System, step: int) -> str:
        """What a person reads: the means, the change against the base, each language."""
        assert self.base is not None
        parts = []
        for measure in self.measures:
            said = f"{'pooled ' * self.options.pool}{measure.label} {points(system.mean(AVERAGE, measure))}"
            if step:
                said += f" ({signed_points(system.mean(AVERAGE, measure) - self.base.system.mean(AVERAGE, measure))})"
            if len(system.languages) > 1:
                said += f" [{', '.join(f'{lang} {points(system.mean(lang, measure))}' for lang in system.languages)}]"
            parts.append(said)
        what = f"step {step}, against the base" if step else "step 0, the untouched base"
        return f"{what}: {'; '.join(parts)}; {self._seconds:.1f} s"

    def _mode_line(self, evaluated: Evaluated) -> str:
        measure = self.measures[0]
        parts = [f"{mode} {points(own.mean(AVERAGE, measure))}" for mode, own in evaluated.modes.items()]
        return f"{measure.label} of other modes: {', '.join(parts)}"

    def _keep(self, evaluated: Evaluated, step: int) -> None:
        path = self.folder / f"step-{step}.json"
        languages = evaluated.system.languages
        value = {lang: {**asdict(scores), "hits": evaluated.hits[lang]} for lang, scores in languages.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, value)
        except OSError as error:
            raise DataError(f"{path}: the figures cannot be kept there: {error.strerror}") from error

    def kept(self, step: int) -> Evaluated | None:
        """What was measured at ``step``, out of its file; None where nothing was."""
        path = self.folder / f"step-{step}.json"
        if not path.is_file():
            return None
        stored: dict[str, Any] = read_json(path)
        hits = {lang: own.pop("hits") for lang, own in stored.items()}
        scores = {lang: LanguageScores(**own) for lang, own in stored.items()}
        return Evaluated(System(f"step {step}", scores), hits)
