"""Numbers and places that cannot be meant are refused in one line, before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding.finetune.checks import check_arguments
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.utils.errors import UsageError

NUMBERS = [
    ("--num_train_epochs 0", "--num_train_epochs must be above 0, got 0: nothing would train"),
    ("--num_train_epochs -2", "--num_train_epochs must be above 0"),
    ("--max_steps 0", "--max_steps must be at least 1, got 0; for whole epochs leave it out"),
    ("--max_steps -5", "--max_steps must be at least 1"),
    ("--warmup_ratio 1.5", "--warmup_ratio is a share of the steps, from 0 to below 1, got 1.5"),
    ("--warmup_ratio 1", "from 0 to below 1"),
    ("--warmup_ratio -0.1", "from 0 to below 1"),
    ("--warmup_steps -1", "warmup_steps"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1, got 0"),
    ("--max_grad_norm -1", "--max_grad_norm must be at least 0"),
    ("--save_total_limit 0", "--save_total_limit must be at least 1"),
    ("--save_steps 0", "--save_steps must be above 0, got 0 (--save_strategy no: never)"),
    ("--save_steps -3", "--save_steps must be above 0"),
    ("--save_steps inf", "infinity"),
    ("--logging_steps -3", "--logging_steps must be above 0"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 4294967296", "--seed must be below 2^32"),
    ("--data_seed -1", "--data_seed must be at least 0"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers must be at least 0"),
    ("--dataloader_num_workers 1 --dataloader_prefetch_factor 0", "--dataloader_prefetch_factor must be at least 1"),
    ("--ddp_timeout 0", "--ddp_timeout is a number of seconds, at least 1, got 0"),
    ("--learning_rate inf", "--learning_rate inf: expected a finite number"),
    ("--temperature nan", "--temperature nan: expected a finite number"),
    ("--weight_decay nan", "--weight_decay nan: expected a finite number"),
    ("--router_z_loss_coef inf", "--router_z_loss_coef inf: expected a finite number"),
]


@pytest.mark.parametrize(("options", "line"), NUMBERS, ids=[options for options, _ in NUMBERS])
def test_numbers_that_cannot_be_meant(options: str, line: str) -> None:
    base = "--model_name_or_path /nowhere/model --train_data /nowhere/rows --output_dir /nowhere/out"
    with pytest.raises(UsageError) as caught:
        check_arguments(parse_arguments([*base.split(), *options.split()]))
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def places(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Path]:
    write_rows(tmp_path / "data/rows.jsonl", rows(8))
    write_rows(tmp_path / "out/old/rows.jsonl", rows(8))
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tiny_model_dir)
    (tmp_path / "out/checkpoint-3").symlink_to(tiny_model_dir)
    return {"here": tmp_path, "model": tiny_model_dir}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--output_dir {model}", "is the folder of --model_name_or_path, which it would overwrite"),
        ("--output_dir {here}/link", "is the folder of --model_name_or_path"),
        ("--output_dir {here}/data", "lies in --train_data"),
        ("--output_dir {here}/data/new/out", "what is written there would be read as rows"),
        ("--output_dir {here}/data --train_data {here}/data/rows.jsonl", "lies in --train_data"),
        ("--output_dir {here}/o --cache_path {here}/data/cache", "--cache_path"),
        ("--output_dir {here}/out --train_data {here}/out/old", "which this run writes: move one of them"),
        ("--output_dir {here}/file", "is a file, not a folder"),
        ("--output_dir {here}/file/out", "is a file, not a folder"),
        ("--output_dir ''", "--output_dir is empty"),
    ],
)
def test_places_that_are_in_each_others_way(words: str, line: str, places: dict[str, Path]) -> None:
    import shlex

    before = sorted(places["here"].rglob("*"))
    given = ["--model_name_or_path", str(places["model"]), "--train_data", str(places["here"] / "data")]
    given += [word.format(**places) for word in shlex.split(words)]
    with pytest.raises(UsageError) as caught:
        check_arguments(parse_arguments(given))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(places["here"].rglob("*")) == before


def test_a_checkpoint_of_the_output_folder_is_no_base_of_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    write_rows(tmp_path / "data/rows.jsonl", rows(8))
    shutil.copytree(tiny_model_dir, tmp_path / "out/checkpoint-3")
    words = train_words(tmp_path / "out/checkpoint-3", tmp_path / "data", tmp_path / "out")
    with pytest.raises(UsageError, match="holds --model_name_or_path among its checkpoints"):
        check_arguments(parse_arguments(words))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    words = train_words(tiny_model_dir, write_rows(tmp_path / "a.jsonl", rows(8)), tmp_path / "locked/out")
    with pytest.raises(UsageError, match="no permission to write to"):
        check_arguments(parse_arguments(words))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"query_max_len": 2}, "--query_max_len 2: 2 special tokens take 2, nothing is left of the text: give more"),
        ({"passage_max_len": 1}, "--passage_max_len 1: 2 special tokens take 2"),
        ({"query_max_len": 8, "query_instruction_for_retrieval": "Find what answers this: "}, "the instruction 'Find"),
    ],
)
def test_lengths_that_leave_nothing_of_the_text(
    options: dict[str, object], line: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data/rows.jsonl", rows(8))
    answer = run_training(train_words(tiny_model_dir, tmp_path / "data", tmp_path / "out", **options), check=False)
    assert answer.returncode == 2 and line in answer.stderr
    run_training(train_words(tiny_model_dir, tmp_path / "data", tmp_path / "out", max_steps=1, query_max_len=3))


def test_names_that_look_like_patterns(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Brackets and stars in every name: trained, continued, and the oldest checkpoint alone removed."""
    here = tmp_path / "a[1]*"
    write_rows(here / "data[2]/rows[3].jsonl", rows(8))
    words = train_words(
        tiny_model_dir, here / "data[2]", here / "out[4]?", max_steps=3, save_strategy="steps", save_steps=1,
        save_total_limit=2, cache_path=here / "cache[5]",
    )  # fmt: skip
    run_training(words)
    assert sorted(path.name for path in (here / "out[4]?").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    answer = run_training([*words, "--resume_from_checkpoint", "True"])
    assert "starting at the first step" not in answer.stderr


def test_warmup_that_never_ends_is_said(caplog: pytest.LogCaptureFixture) -> None:
    base = "--model_name_or_path m --train_data d --output_dir o --max_steps 5 --warmup_steps"
    for steps, count in (("5", 1), ("4", 0), ("0.1", 0)):
        caplog.clear()
        check_arguments(parse_arguments([*base.split(), steps]))
        assert caplog.text.count("the learning rate never gets to") == count
