"""Every option of reproduce_table.py acts: it stands in the commands that are run, or where the table is written."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from options_walk import Case, assert_acts, assert_complete

from paper_table.command import ReproduceArguments, TrainOverrides, reproduce

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = {
    "base_model": Case("--base_model BAAI/other", only=("train", "index", "search", "score")),
    "languages": Case("--languages hi", only=("train", "index", "search", "score")),
    "train_dir": Case("--train_dir TRAIN", only=("train",)),
    "data_dir": Case("--data_dir SAMPLE", only=("index", "search")),
    "split": Case("--split train", only=("index", "search", "score")),
    "output_dir": Case("--output_dir elsewhere", only=("train", "index", "search", "score")),
    "seeds": Case("--seeds 1 2", only=("train",)),
    "rows": Case("--rows baseline ance-clp", only=("train",)),
    "table": Case("--table TABLE", only=("train", "index")),
    "metrics": Case("--metrics map", only=("score",)),
    "pooling_method": Case("--pooling_method mean", only=("train", "index", "search")),
    "query_instruction_for_retrieval": Case("--query_instruction_for_retrieval 'a: '", only=("train", "search")),
    "passage_instruction_for_retrieval": Case("--passage_instruction_for_retrieval 'a: '", only=("train", "index")),
    "fp16": Case("--fp16 n", only=("train", "index", "search")),
    "max_query_length": Case("--max_query_length 9", only=("search",)),
    "max_passage_length": Case("--max_passage_length 9", only=("index",)),
    "batch_size": Case("--batch_size 9", only=("index", "search")),
    "hits": Case("--hits 9", only=("search",)),
    "threads": Case("--threads 9", only=("search",)),
    "with_title": Case("--with_title", only=("index",)),
    "train_args": Case("--train_args '--weight_decay 0.1'", only=("train",)),
    "train_launcher": Case("--train_launcher 'torchrun --nproc_per_node 2'", only=("train",)),
}
CASES |= {
    name: Case(f"--{name} {value}", only=("train",))
    for name, value in {
        "learning_rate": 3e-4, "max_steps": 3, "num_train_epochs": 4, "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 6, "train_group_size": 7, "temperature": 0.5, "query_max_len": 8,
        "passage_max_len": 9, "warmup_ratio": 0.25,
    }.items()
}  # fmt: skip
RUN = "test_a_small_real_table_and_going_on_with_it"
EXEMPT = {"dry_run": "without it the commands run", "qrels_dir": RUN, "keep_indexes": RUN, "resamples": RUN}
# A command that must not change with an option, which then decides nothing of its product.
ALONE = {
    "metrics": ("train", "index", "search"), "hits": ("train", "index", "score"),
    "max_query_length": ("train", "index", "score"), "max_passage_length": ("train", "search", "score"),
    "query_instruction_for_retrieval": ("index", "score"), "passage_instruction_for_retrieval": ("search", "score"),
    "learning_rate": ("index", "search", "score"),
}  # fmt: skip


def test_no_field_is_left_out() -> None:
    assert_complete((ReproduceArguments, TrainOverrides), CASES, EXEMPT)


@pytest.fixture
def observe(tmp_path: Path, sample_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    train = [sample_dir / "train", sample_dir / "train_random"]
    (tmp_path / "copied").mkdir()
    for folder in train:
        for path in folder.glob("fa_*.jsonl"):
            shutil.copy(path, tmp_path / "copied")
    recipes = tmp_path / "recipes"
    shutil.copytree(REPOSITORY / "configs" / "paper", recipes)
    lines = (recipes / "table.yaml").read_text(encoding="utf-8")
    (recipes / "table.yaml").write_text(lines.replace("  - name: baseline\n", ""), encoding="utf-8")
    places = {"SAMPLE": sample_dir, "TRAIN": tmp_path / "copied", "TABLE": recipes / "table.yaml"}
    base = ["--base_model", "BAAI/bge-m3", "--languages", "fa", "--dry_run", "--train_dir", *map(str, train)]

    def run(words: list[str]) -> dict[str, Any]:
        assert reproduce(REPOSITORY, [*base, *(str(places.get(word, word)) for word in words)]) == 0
        commands = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
        names = {"train": "run.py", "index": "step0", "search": "step1", "score": "step2"}
        return {stage: [line for line in commands if name in line] for stage, name in names.items()}

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_option_acts(name: str, observe) -> None:
    assert_acts(CASES[name], observe)


@pytest.mark.parametrize("name", ALONE)
def test_an_option_changes_no_command_of_another_stage(name: str, observe) -> None:
    without, with_it = observe([]), observe(shlex.split(CASES[name].words))
    assert {stage: with_it[stage] == without[stage] for stage in ALONE[name]} == dict.fromkeys(ALONE[name], True)
