"""What the options of evaluation while training mean for Hugging Face's, and what is refused for its machine."""

from __future__ import annotations

import shlex

import pytest

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.dev.arguments import EvaluationArguments, best_metric, settle
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.utils.errors import UsageError

BASE = "--model_name_or_path m --train_data d --output_dir o --report_to none"
DEV = "--eval_data_dir d --eval_languages ko fa"


def parsed(words: str) -> Arguments:
    return parse_arguments(shlex.split(f"{BASE} {words}"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (DEV, ("epoch", None, "ndcg@10")),
        (f"{DEV} --eval_steps 20", ("steps", 20, "ndcg@10")),
        (f"{DEV} --eval_strategy steps --eval_steps 0.1", ("steps", 0.1, "ndcg@10")),
        (f"{DEV} --eval_corpus pool", ("epoch", None, "pooled_ndcg@10")),
        ("--eval_rows 5 --eval_metrics recall@20 ndcg@10", ("epoch", None, "pooled_recall@20")),
        (f"{DEV} --metric_for_best_model nDCG@10", ("epoch", None, "ndcg@10")),
        (f"{DEV} --metric_for_best_model eval_ko_recall@100", ("epoch", None, "ko_recall@100")),
        (f"{DEV} --eval_corpus pool --metric_for_best_model pooled_fa_ndcg@10", ("epoch", None, "pooled_fa_ndcg@10")),
        (f"{DEV} --lr_scheduler_type reduce_lr_on_plateau --eval_steps 5", ("steps", 5, "ndcg@10")),
    ],
)
def test_what_follows_from_the_options(words: str, expected: tuple[str, float | None, str]) -> None:
    for more in ("", " --load_best_model_at_end True", " --save_strategy best"):
        training = parsed(words + more).training
        assert (training.eval_strategy, training.eval_steps, training.metric_for_best_model) == expected
        assert training.greater_is_better is True and training.do_eval
        assert training.load_best_model_at_end == ("load_best" in more)


def test_a_run_without_evaluation_stays_as_it_was() -> None:
    training = parsed("").training
    assert (training.eval_strategy, training.do_eval, training.metric_for_best_model) == ("no", False, None)
    assert not parsed("").evaluation.on


def test_a_language_that_is_not_evaluated_cannot_decide() -> None:
    with pytest.raises(UsageError, match="hi_ndcg@10: not evaluated"):
        best_metric("hi_ndcg@10", parsed(DEV).evaluation)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_sharded_weights_are_refused(kind: str) -> None:
    training = parsed(DEV).training
    setattr(training, kind, {"fsdp": ["full_shard"], "deepspeed": {"zero": 3}}[kind])
    with pytest.raises(UsageError, match="does not work with --fsdp or --deepspeed"):
        settle(training, EvaluationArguments(eval_data_dir="d", eval_languages=["ko"]))
