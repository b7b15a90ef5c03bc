"""Evaluation while training: the figures of steps 0 to 2, losses that know nothing of it, on one process and on two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import MEASURES, by_the_steps, dev_lines, losses, write_dev
from finetune.helpers import TOGETHER, rows, run_training, train_words, write_rows

OPTIONS: dict[str, Any] = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3, "save_total_limit": None,
    "query_instruction_for_retrieval": "find: ", "passage_instruction_for_retrieval": "text: ",
    "same_task_within_batch": False, "logging_steps": 1, "sentence_pooling_method": "mean",
}  # fmt: skip
LISTS = ["--eval_languages", "ko", "fa", "--eval_metrics", *MEASURES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(24))
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Korean beyond one window of the encoder, Persian within one."""
    root = tmp_path_factory.mktemp("dev")
    write_dev(root, "ko", 2_100)
    return write_dev(root, "fa", 60, seed=3)


@pytest.fixture(scope="module")
def evaluated(tiny_dropout_dir: Path, data: Path, dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with dropout, evaluated every two of them."""
    output = tmp_path_factory.mktemp("run") / "evaluated"
    words = train_words(tiny_dropout_dir, data, output, **OPTIONS, eval_data_dir=dev, eval_steps=2)
    answer = run_training([*words, *LISTS])
    (output / "stderr").write_text(answer.stderr)
    return output


def figures(line: dict[str, Any]) -> dict[str, dict[str, float]]:
    """An evaluation's line in the form of step 2's results."""
    found = {"average": {key: line[f"eval_{key}"] for key in MEASURES}}
    return found | {lang: {key: line[f"eval_{lang}_{key}"] for key in MEASURES} for lang in ("ko", "fa")}


def test_the_figures_are_those_of_the_steps(evaluated: Path, tiny_dropout_dir: Path, dev: Path, tmp_path: Path) -> None:
    lines = dev_lines(evaluated)
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        checkpoint = evaluated / f"checkpoint-{line['step']}"
        if not line["step"]:  # the untouched base, which knows nothing of the run's instructions
            checkpoint = shutil.copytree(tiny_dropout_dir, tmp_path / "base")
            for name in ("config_sentence_transformers.json", "modules.json"):
                shutil.copy(evaluated / name, checkpoint)
            shutil.copytree(evaluated / "1_Pooling", checkpoint / "1_Pooling")
        assert by_the_steps(checkpoint, dev, ["ko", "fa"], tmp_path / "steps") == figures(line)
    assert len({line["eval_ndcg@10"] for line in lines}) == 3
    found = [line[f"eval_{lang}_recall@20"] for line in lines for lang in ("ko", "fa")]
    assert 0 < max(found) < 1  # a random encoder may find nothing among 2,100 passages


def test_losses_are_those_of_a_run_without(evaluated: Path, tiny_dropout_dir: Path, data: Path, tmp_path: Path) -> None:
    run_training(train_words(tiny_dropout_dir, data, tmp_path / "plain", **OPTIONS))
    assert losses(tmp_path / "plain") == losses(evaluated)
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (evaluated / name).read_bytes()


def test_a_reader_sees_the_change_against_the_base(evaluated: Path) -> None:
    said = [line for line in (evaluated / "stderr").read_text().splitlines() if "nDCG@10" in line]
    base, last = dev_lines(evaluated)[0], dev_lines(evaluated)[-1]
    assert "step 0, the untouched base" in said[0] and "(" not in said[0].split("nDCG")[1][:12]
    change = 100 * (last["eval_ndcg@10"] - base["eval_ndcg@10"])
    assert f"nDCG@10 {100 * last['eval_ndcg@10']:.1f} ({change:+.1f})".replace("-", "−") in said[2]
    assert f"ko {100 * last['eval_ko_ndcg@10']:.1f}" in said[2]


def test_two_processes_share_the_corpus_and_agree(
    evaluated: Path, tiny_dropout_dir: Path, data: Path, dev: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "per_device_train_batch_size": 1, "max_steps": 2}
    words = train_words(tiny_dropout_dir, data, tmp_path / "two", **options, eval_data_dir=dev, eval_steps=2)
    run_training([*words, *LISTS], TOGETHER)
    base, after = dev_lines(tmp_path / "two")
    assert figures(base) == figures(dev_lines(evaluated)[0])
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert by_the_steps(checkpoint, dev, ["ko", "fa"], tmp_path / "steps") == figures(after)


@pytest.mark.parametrize(
    ("options", "step0"),
    [
        ({"normlized": False}, ["--normalize_embeddings", "False"]),
        ({"bf16": True}, ["--dtype", "bf16"]),
        ({"eval_with_title": True, "eval_passage_length": 20}, ["--with_title", "--max_passage_length", 20]),
    ],
)
def test_the_figures_of_other_vectors(
    options: dict[str, Any], step0: list[object], tiny_dropout_dir: Path, data: Path, dev: Path, tmp_path: Path
) -> None:
    settings = {**OPTIONS, "max_steps": 1, "save_steps": 1, **options}
    words = train_words(tiny_dropout_dir, data, tmp_path / "out", **settings, eval_data_dir=dev, eval_steps=1)
    run_training([*words, "--eval_languages", "fa", "--eval_metrics", *MEASURES])
    found = by_the_steps(tmp_path / "out/checkpoint-1", dev, ["fa"], tmp_path / "steps", MEASURES, *step0)
    line = dev_lines(tmp_path / "out")[-1]
    assert found["fa"] == {key: line[f"eval_fa_{key}"] for key in MEASURES}
