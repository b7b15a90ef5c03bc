"""The options of evaluation while training, and what they mean for Hugging Face's.

``TrainingArguments`` know ``--eval_steps``, ``--load_best_model_at_end`` and so on, but neither our collections nor our
measures: :func:`before` and :func:`settle` say the one to the other. Evaluation itself is imported only where it is on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeVar

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.modes import DENSE, Mode

if TYPE_CHECKING:
    from FlagEmbedding.evaluation.metrics import Measure

T = TypeVar("T")
Split = Literal["train", "dev", "testA", "testB"]
CorpusKind = Literal["pool", "whole"]
POOLED = "pooled_"  # begins the names of figures over a pool


@dataclass(frozen=True)
class EvaluationArguments:
    """Evaluation while training and the report; by --eval_steps, else once per epoch."""

    eval_data_dir: str | None = option(None, "Folder in MIRACL's layout; its queries are searched while training.")
    eval_languages: list[str] = option([], "Which languages of it, such as ko fa hi.")
    eval_split: Split = choice(Split, "dev", "Which of its queries.")
    eval_rows: float | None = option(
        None, "Instead: hold out so many training rows (a share below 1) and evaluate on a pool of their passages."
    )
    eval_corpus: CorpusKind | None = choice(
        CorpusKind,
        None,
        "whole: every passage, the default of --eval_data_dir; pool: what is judged, what the base finds best, and a "
        "random sample, whose figures are called pooled.",
    )
    eval_pool_mined: int = option(20, "Passages of a pool that the base finds best, per query.")
    eval_pool_random: int = option(2_000, "Passages of a pool drawn at random.")
    eval_metrics: list[str] = option(["ndcg@10", "recall@100"], "ndcg@k recall@k mrr@k map@k p@k")
    eval_query_length: int = option(512, "Tokens of a dev query, as in step 1.")
    eval_passage_length: int = option(512, "Tokens of a dev passage, as in step 0.")
    eval_with_title: bool = switch(False, "Dev passages are title and text, as in step 0.")
    eval_modes: list[str] = option(
        ["dense"], "What is measured: dense, and with --unified_finetuning sparse, colbert, sums such as all."
    )
    early_stopping_patience: int = option(0, "Stop after so many evaluations in a row without a new best; 0: never.")

    report: bool = switch(True, "Write report.md and report.png into the output folder when the run ends.")
    model_card: bool = switch(True, "Write README.md, a model card for the hub; one that somebody wrote stays.")
    license: str | None = option(
        None, "Licence that the model card names; default: the base's, where its card says it."
    )

    def __post_init__(self) -> None:
        if self.eval_data_dir and self.eval_rows is not None:
            raise UsageError("--eval_data_dir and --eval_rows each name the dev queries: give one of them")
        if bool(self.eval_data_dir) != bool(self.eval_languages):
            raise UsageError("--eval_data_dir and --eval_languages belong together: give both or neither")
        rows = self.eval_rows
        if rows is not None and (rows <= 0 or (rows >= 1 and rows != int(rows))):
            raise UsageError(f"--eval_rows {rows:g}: give a share between 0 and 1, or a whole number of rows")
        if rows is not None and self.eval_corpus == "whole":
            raise UsageError("--eval_corpus whole: held-out rows have a pool of passages and no corpus; leave it out")
        for name in ("eval_pool_mined", "eval_pool_random", "early_stopping_patience"):
            if (value := getattr(self, name)) < 0:
                raise UsageError(f"--{name} must be 0 or more, got {value}")
        for name in ("eval_query_length", "eval_passage_length"):
            if (value := getattr(self, name)) < 3:
                raise UsageError(f"--{name} {value} leaves no room for text; give 3 or more")
        for given in self._without_effect():
            raise UsageError(given)

    def _without_effect(self) -> Iterator[str]:
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        outcome = {"report", "model_card", "license"}
        needs = dict.fromkeys(set(defaults) - outcome, ("--eval_data_dir or --eval_rows", self.on))
        needs |= dict.fromkeys(("eval_pool_random", "eval_pool_mined"), ("--eval_corpus pool", self.pool))
        needs["license"] = ("--model_card", self.model_card)
        needs["eval_split"] = needs["eval_with_title"] = ("--eval_data_dir", bool(self.eval_data_dir))
        if self.eval_rows is not None:
            needs["eval_pool_mined"] = ("--eval_data_dir", False)
        for name, (needed, there) in needs.items():
            if not there and getattr(self, name) != defaults[name]:
                yield f"--{name} has no effect without {needed}"

    @property
    def on(self) -> bool:
        """True where anything is evaluated."""
        return bool(self.eval_data_dir) or self.eval_rows is not None

    @property
    def pool(self) -> bool:
        """True where figures are those of a pool."""
        return self.eval_corpus == "pool" or self.eval_rows is not None

    @property
    def measures(self) -> list[Measure]:
        """What ``--eval_metrics`` names. Raises ``UsageError``."""
        from FlagEmbedding.evaluation.metrics import parse_measures

        return under_our_names(lambda: parse_measures(self.eval_metrics))

    @property
    def other_modes(self) -> list[Mode]:
        """What ``--eval_modes`` names beside dense, which is always measured. Raises ``UsageError``."""
        if self.eval_modes == ["dense"]:
            return []
        from FlagEmbedding.evaluation.live_modes import live_modes

        return [mode for mode in live_modes(self.eval_modes) if mode != DENSE]

    @property
    def prefix(self) -> str:
        """What the names of figures begin with, after ``eval_``."""
        return POOLED if self.pool else ""


def under_our_names(call: Callable[[], T]) -> T:
    """``call``, whose errors name the flags of steps 0 to 2; here they begin with ``--eval_``."""
    try:
        return call()
    except UserError as error:
        raise type(error)(re.sub(r"--(languages|metrics|data_dir)\b", r"--eval_\1", str(error))) from error


def before(training: TrainingArguments) -> None:
    """What ``TrainingArguments`` shall see when they check themselves."""
    if training.eval_steps is not None and _is(training.eval_strategy, "no"):
        training.eval_strategy = "steps"


def settle(training: TrainingArguments, evaluation: EvaluationArguments) -> None:
    """Tell ``training`` when to evaluate and what is best; refuse what needs an evaluation where there is none.

    Raises:
        UsageError: a measure that is not evaluated, or options that contradict each other.
    """
    if not evaluation.on:
        for complaint in _needs_evaluation(training):
            raise UsageError(complaint)
        return
    if _is(training.eval_strategy, "no"):
        training.eval_strategy, training.do_eval = IntervalStrategy.EPOCH, True
    if training.fsdp or training.deepspeed:
        raise UsageError(
            "evaluation while training does not work with --fsdp or --deepspeed: run steps 0 to 2 on the checkpoints"
        )
    given = training.metric_for_best_model
    if given not in (None, "loss") and training.greater_is_better is False:
        raise UsageError("--greater_is_better False: every measure of retrieval is better when it is greater")
    training.metric_for_best_model = best_metric(None if given == "loss" else given, evaluation)
    training.greater_is_better = True
    training.eval_on_start = False  # the base is always evaluated, as step 0


def best_metric(given: str | None, evaluation: EvaluationArguments) -> str:
    """The log key, without ``eval_``, of the measure that ``given`` names; by default the first one evaluated."""
    measures = evaluation.measures
    if given is None:
        return evaluation.prefix + measures[0].key
    name = given.lower().removeprefix("eval_").removeprefix(POOLED)
    lang, _, rest = name.partition("_")
    language = f"{lang}_" if lang in evaluation.eval_languages else ""
    key = (rest if language else name).replace("_cut.", "@")
    if key not in {measure.key for measure in measures}:
        raise UsageError(
            f"--metric_for_best_model {given}: not evaluated; --eval_metrics says {' '.join(m.key for m in measures)}"
        )
    return f"{evaluation.prefix}{language}{key}"


def _needs_evaluation(training: TrainingArguments) -> Iterator[str]:
    needed = "needs an evaluation: name the dev queries by --eval_data_dir or --eval_rows"
    if not _is(training.eval_strategy, "no"):
        given = "eval_steps" if training.eval_steps is not None else "eval_strategy"
        value = training.eval_steps if training.eval_steps is not None else _text(training.eval_strategy)
        yield f"--{given} {value} {needed}"
    if training.load_best_model_at_end:
        yield f"--load_best_model_at_end {needed}"
    if _is(training.save_strategy, "best"):
        yield f"--save_strategy {SaveStrategy.BEST.value} {needed}"
    for name, default in (("metric_for_best_model", None), ("greater_is_better", None), ("eval_delay", 0)):
        if getattr(training, name) not in (default, None):
            yield f"--{name} {_text(getattr(training, name))} {needed}"
    if training.eval_on_start:
        yield f"--eval_on_start {needed}"


def _text(value: object) -> str:
    return str(getattr(value, "value", value))


def _is(value: object, text: str) -> bool:
    return _text(value) == text or (text == "no" and value is False)  # which the parser makes of a bare "no"
