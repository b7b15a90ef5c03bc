"""A recipe and a command line say the same; words after the recipe override it; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from FlagEmbedding.finetune.parsing import config_words, parse_arguments
from FlagEmbedding.utils.errors import UsageError

RECIPE: dict[str, Any] = {
    "model_name_or_path": "m",
    "train_data": ["a", "b c"],
    "output_dir": "o",
    "learning_rate": 3e-4,
    "normlized": False,
    "unified_finetuning": True,
    "self_distill_start_step": -1,
    "penalty_weight": 0,
    "cache_path": None,
    "lr_scheduler_kwargs": {"num_cycles": 2},
}


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.yml", "recipe.json"])
def test_a_recipe_is_its_command_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(RECIPE) if name.endswith("json") else yaml.safe_dump(RECIPE))
    arguments = parse_arguments([str(path)])
    assert arguments.data.train_data == ["a", "b c"]
    assert arguments.training.learning_rate == 3e-4
    assert arguments.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (arguments.model.normalize_embeddings, arguments.objective.unified_finetuning) == (False, True)
    assert (arguments.objective.penalty_weight, arguments.objective.self_distill_start_step) == (0.0, -1)
    assert arguments.data.cache_path is None
    changed = parse_arguments([str(path), "--learning_rate", "1e-5", "--train_data", "z"])
    assert (changed.training.learning_rate, changed.data.train_data) == (1e-5, ["z"])
    assert changed.objective == arguments.objective


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "r.json: not valid json: "),
        ("r.yaml", "a: [", "r.yaml: not valid yaml: "),
        ("r.yaml", "- a", "r.yaml: expected a mapping of option names to values (learning_rate: 1e-5), found a list"),
        ("r.yaml", "", "found nothing"),
        ("r.json", "null", "found nothing"),
        ("r.yaml", "learning_rate", "found the value 'learning_rate'"),
        ("r.json", "[" * 100_000, "r.json: not valid json: nested too deeply"),
        ("r.yaml", "learning_rat: 1", "unknown option --learning_rat "),
        ("r.yaml", "seed: 1\nlearning_rate: 2\nseed: 3", "r.yaml: not valid yaml: seed is there twice"),
        ("r.json", '{"seed": 1, "seed": 2}', "r.json: not valid json: seed is there twice"),
        ("r.yaml", "train_data: [a, null]", "r.yaml: train_data: expected texts and numbers in the list, found null"),
    ],
)
def test_a_faulty_recipe_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    words = [str(tmp_path / name), "--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]
    with pytest.raises(UsageError) as caught:
        parse_arguments(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_are_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 010\nrun_name: 12:30:45\nfp16: no\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    words = ["--seed", "010", "--run_name", "12:30:45", "--fp16", "False", "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    assert config_words(tmp_path / "r.yaml") == words


def test_a_text_that_looks_like_an_option_is_a_value(tmp_path: Path) -> None:
    recipe = {**RECIPE, "query_instruction_for_retrieval": "-q ", "passage_instruction_for_retrieval": "--passage "}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    data = parse_arguments([str(tmp_path / "r.yaml")]).data
    assert (data.query_instruction_for_retrieval, data.passage_instruction_for_retrieval) == ("-q ", "--passage ")


def test_flags_are_not_abbreviated() -> None:
    words = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]
    with pytest.raises(UsageError, match="unknown option --penalty_wei "):
        parse_arguments([*words, "--penalty_wei", "0.2"])
    assert parse_arguments([*words, "--penalty-weight", "0.2"]).objective.penalty_weight == 0.2
