"""Contradictions are refused in one line with exit code 2, before any model or data is touched: a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from FlagEmbedding.finetune.checks import check_arguments, check_router
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.utils.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]

REFUSED = [
    ("--moe foo", "argument --moe: invalid choice: 'foo'"),
    ("--only_train foo", "argument --only_train/--only-train: invalid choice: 'foo'"),
    ("--moe output --only_train intermediate", "would leave every expert frozen: use --only_train output"),
    ("--moe intermediate --only_train output", "would leave every expert frozen: use --only_train intermediate"),
    ("--moe output --num_experts 2 --num_experts_per_tok 3", "--num_experts_per_tok 3 is more than --num_experts 2"),
    ("--num_experts 2", "--num_experts 2 has no effect without --moe"),
    ("--num_experts 0 --moe output", "--num_experts must be at least 1, got 0"),
    ("--train_group_size 1 --per_device_train_batch_size 1", "raise --train_group_size to at least 2"),
    ("--train_group_size 0", "--train_group_size must be at least 1, got 0"),
    ("--fix_encoder", "nothing would train"),
    ("--fix_encoder --unified_finetuning --only_train output", "--fix_encoder freezes what --only_train would train"),
    ("--only_train output --fix_position_embedding", "--fix_position_embedding has no effect with --only_train"),
    ("--use_self_distill True", "--use_self_distill has no effect without --unified_finetuning True"),
    ("--unified_finetuning --self_distill_start_step 4", "no effect without --use_self_distill True"),
    ("--colbert_dim 64", "--colbert_dim has no effect without --unified_finetuning True"),
    ("--colbert_dim 0 --unified_finetuning", "--colbert_dim must be -1"),
    ("--penalty_weight 1.5", "--penalty_weight is λ in [0, 1], got 1.5"),
    ("--temperature 0", "--temperature must be above 0, got 0.0"),
    ("--shuffle_ratio 2", "--shuffle_ratio is a chance in [0, 1], got 2.0"),
    ("--router_jitter 1", "--router_jitter must be in [0, 1), got 1.0"),
    ("--router_z_loss_coef -1", "--router_z_loss_coef must not be negative"),
    ("--knowledge_distillation --train_group_size 1 --per_device_train_batch_size 2", "leaves the teacher nothing"),
    ("--batch_size_by_length --train_group_size 5", "has a table for --train_group_size 8 and 1 only, got 5"),
    ("--engine padded --grad_cache", "--grad_cache works on the slabs of --engine packed"),
    ("--slab_tokens -1", "--slab_tokens must be 0"),
    ("--fp16 --bf16", "--fp16 and --bf16 exclude each other"),
    ("--warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio and --warmup_steps"),
    ("--eval_strategy epoch", "--eval_strategy epoch needs an evaluation: name the dev queries by --eval_data_dir"),
    ("--eval_steps 5", "--eval_steps 5 needs an evaluation"),
    ("--load_best_model_at_end --save_strategy no", "--load_best_model_at_end needs an evaluation"),
    ("--save_strategy best", "--save_strategy best needs an evaluation"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
    ("--early_stopping_patience 2", "no effect without --eval_data_dir or --eval_rows"),
    ("--eval_rows 5 --early_stopping_patience -1", "--early_stopping_patience must be 0 or more"),
    ("--eval_rows 5 --eval_data_dir d --eval_languages ko", "give one of them"),
    ("--eval_data_dir d", "--eval_data_dir and --eval_languages belong together"),
    ("--eval_rows 1.5", "--eval_rows 1.5: give a share between 0 and 1, or a whole number of rows"),
    ("--eval_rows 0", "--eval_rows 0: give a share"),
    ("--eval_rows 5 --eval_corpus whole", "held-out rows have a pool of passages"),
    ("--eval_rows 5 --eval_pool_mined 3", "--eval_pool_mined has no effect without --eval_data_dir"),
    ("--eval_data_dir d --eval_languages ko --eval_pool_random 3", "no effect without --eval_corpus pool"),
    ("--eval_rows 5 --eval_with_title", "--eval_with_title has no effect without --eval_data_dir"),
    ("--eval_rows 5 --eval_query_length 2", "--eval_query_length 2 leaves no room for text"),
    ("--eval_rows 5 --eval_metrics bleu", "--eval_metrics bleu: expected nDCG@k, Recall@k"),
    ("--eval_rows 5 --metric_for_best_model mrr@10", "--metric_for_best_model mrr@10: not evaluated"),
    ("--eval_rows 5 --metric_for_best_model ndcg@10 --greater_is_better False", "better when it is greater"),
    ("--grad_cache --fsdp full_shard", "--grad_cache does not work with --fsdp"),
    ("--report_to nobody", "--report_to nobody: expected none, all or one of"),
    ("--fsdp full_shard", "--fsdp divides a model over accelerators, and there is none"),
    ("--auto_find_batch_size True", "would change the batch"),
    ("--refresh_negatives_every_n_epochs 2 --num_train_epochs 2", "2 has no effect in 2 epoch(s): train longer"),
    ("--max_example_num_per_dataset 0", "--max_example_num_per_dataset must be at least 1, got 0"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1, got 0"),
    ("--query_max_len 0", "--query_max_len must be at least 1, got 0"),
    ("--router_aux_loss_coef -1", "--router_aux_loss_coef must not be negative"),
    ("--temprature 0.1", "unknown option --temprature"),
    ("--normlized maybe", "Truthy value expected"),
    ("--query_max_len many", "invalid int value: 'many'"),
]


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[options for options, _ in REFUSED])
def test_refused_in_one_line(options: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_arguments(parse_arguments([*BASE, *options.split()]))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


WARNED = [
    ("--normlized False", "the temperature is 1, as published"),
    ("--normlized False --temperature 1", ""),
    ("--negatives_cross_device True", "has no effect in a single process"),
    ("--train_group_size 1 --per_device_train_batch_size 2", ""),
]


@pytest.mark.parametrize(("options", "line"), WARNED, ids=[options for options, _ in WARNED])
def test_what_merely_has_no_effect_is_warned_of(options: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = parse_arguments([*BASE, *options.split()])
    caplog.clear()
    check_arguments(arguments)
    warned = [record.getMessage() for record in caplog.records if record.name.endswith("checks")]
    assert len(warned) == bool(line)
    assert all(line in message for message in warned)


@pytest.mark.parametrize(
    ("options", "per_token", "answer"),
    [
        ("--router_aux_loss_coef 0.1", None, "--router_aux_loss_coef 0.1 has no effect without experts"),
        ("--router_z_loss_coef 0.1", None, "--router_z_loss_coef 0.1 has no effect without experts"),
        ("--router_jitter 0.1", None, "--router_jitter 0.1 has no effect without experts"),
        ("--router_gradient straight_through", None, "--router_gradient straight_through has no effect without"),
        ("", None, ""),
        ("", 1, "routing stays random"),
        ("", 2, ""),
        ("--router_gradient straight_through", 1, ""),
        ("--router_z_loss_coef 0.1", 1, ""),
    ],
)
def test_routers(options: str, per_token: int | None, answer: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = parse_arguments([*BASE, *options.split()])
    caplog.clear()
    if per_token is None and answer:
        with pytest.raises(UsageError, match=answer):
            check_router(arguments, per_token)
    else:
        check_router(arguments, per_token)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (per_token is not None and bool(answer))
    assert all(answer in message for message in warned)


def test_a_warmup_ratio_is_that_share_of_the_steps() -> None:
    training = parse_arguments([*BASE, "--warmup_ratio", "0.25"]).training
    assert training.get_warmup_steps(40) == 10


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*BASE, "--moe", "foo"], "error: argument --moe: invalid choice: 'foo'"),
        (["recipe.yaml"], "error: recipe.yaml: no such configuration file"),
        (["recipe.txt"], "error: recipe.txt: expected a .yaml or .json configuration"),
        (["--train_data", "d"], "error: the following arguments are required: --model_name_or_path"),
        (BASE, "error: d: there is no such file or folder; check the path"),
    ],
)
def test_the_command_exits_2_with_one_line_and_no_traceback(words: list[str], line: str, tmp_path: Path) -> None:
    answer = run_command(*words, cwd=tmp_path)
    assert answer.returncode == 2
    errors = [text for text in answer.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(line)
    assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == []
