"""What a report says of how far a model moved, against the saved files and the published face of the encoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune.dev_data import losses
from finetune.helpers import rows, run_training, train_words, write_rows
from safetensors.torch import load_file

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.report.change import parts

OPTIONS: dict[str, Any] = {"train_group_size": 5, "sentence_pooling_method": "mean", "report": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", rows(14)).parent


def moved(output: Path) -> dict[str, list[str]]:
    """The tables of "What moved" by the first cell of each line."""
    section = (output / "report.md").read_text().split("## What moved")[1].split("\n## ")[0]
    lines = re.findall(r"^\| *(.+?) *\|$", section, re.M)
    return {cells[0]: cells[1:] for line in lines if len(cells := re.split(r" *\| *", line)) == 3}


def test_against_the_files_and_the_encoder(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", **OPTIONS, max_steps=3)
    run_training(words)
    run_training([*train_words(tiny_model_dir, data, tmp_path / "plain", **{**OPTIONS, "report": False}, max_steps=3)])
    assert losses(tmp_path / "plain") == losses(tmp_path / "out")
    page = moved(tmp_path / "out")
    folders = (tiny_model_dir, tmp_path / "out")
    old, new = ({k: v.double() for k, v in load_file(f / "model.safetensors").items()} for f in folders)
    for part, chosen in (
        ("attention", [k for k in old if "attention" in k and "LayerNorm" not in k]),
        ("norms", [k for k in old if "LayerNorm" in k]),
        ("embeddings", [k for k in old if "embeddings.weight" in k]),
        ("feed-forward", [k for k in old if "dense" in k and "attention" not in k and "pooler" not in k]),
    ):
        change, norm = (
            torch.cat([t[k].flatten() for k in chosen]).norm() for t in ({k: new[k] - old[k] for k in chosen}, old)
        )
        count = sum(old[k].numel() for k in chosen)
        assert page[part] == [f"{count:,}", f"{float(change / norm):.2%}"]
    found = []
    for folder in folders:
        options = {"pooling_method": "mean", "query_max_length": 24, "passage_max_length": 48}
        model = FlagModel(str(folder), **options)
        queries = model.encode_queries([row["query"] for row in rows(14)])
        passages = [model.encode_corpus([*row["pos"], *row["neg"]]) for row in rows(14)]
        found.append((queries, np.stack(passages)))
    (queries, passages), (queries2, passages2) = found
    assert float(page["cosine of queries with themselves"][1]) == pytest.approx(
        (queries * queries2).sum(1).mean(), abs=1e-4
    )
    texts = float(page["cosine of passages with themselves"][1])
    assert texts == pytest.approx((passages * passages2).sum(2).mean(), abs=1e-4) and texts < 0.999
    for column, (asked, given) in enumerate(found):
        scores = np.einsum("nd,ngd->ng", asked, given)
        margins = scores[:, :1] - scores[:, 1:]
        assert float(page["margin over all negatives, median"][column]) == pytest.approx(np.median(margins), abs=1e-4)
        least = margins.min(axis=1)
        assert float(page["margin over the hardest, median"][column]) == pytest.approx(np.median(least), abs=1e-4)
        assert page["rows with a negative above"][column] == f"{(least < 0).mean():.1%}"


def test_a_run_that_learns_nothing_moved_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """New gates too, which are drawn at random: the base is made again with those that the run began with."""
    words = train_words(
        tiny_model_dir, data, tmp_path / "out", **OPTIONS, max_steps=1, learning_rate=0, moe="output", num_experts=2,
        unified_finetuning=True, eval_rows=3, eval_steps=1,
    )  # fmt: skip
    run_training(words)
    page = moved(tmp_path / "out")
    for part in ("routers", "experts", "heads", "attention"):
        assert page[part][1] == "0.00%"
    assert page["cosine of passages with themselves"] == ["1", "1.0000"]
    assert page["margin over the hardest, median"][0] == page["margin over the hardest, median"][1]


def test_a_continued_run_is_compared_with_the_base(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(
        tiny_model_dir, data, tmp_path / "out", **OPTIONS, max_steps=2, save_strategy="steps", save_steps=1
    )
    run_training(words)
    once, state = moved(tmp_path / "out"), (tmp_path / "out/trainer_state.json").read_text()
    run_training([*words, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-1")])
    assert moved(tmp_path / "out") == once and once["attention"][1] != "0.00%"
    tokens = re.compile(r'"num_input_tokens_seen": (\d+)')
    (before,), (after,) = tokens.findall(state), tokens.findall((tmp_path / "out/trainer_state.json").read_text())
    assert before == after != "0"


def test_only_what_trains_is_listed(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    more = {**OPTIONS, "max_steps": 1, "only_train": "intermediate", "train_group_size": 1}
    run_training(train_words(tiny_model_dir, data, tmp_path / "out", **more))
    page = moved(tmp_path / "out")
    assert "feed-forward" in page and "attention" not in page and "margin over the hardest, median" not in page


def test_of_adapters_the_layers_that_they_move_are_listed(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    more = {**OPTIONS, "max_steps": 1, "lora_r": 2, "lora_target": "attention"}
    run_training(train_words(tiny_model_dir, data, tmp_path / "out", **more))
    page = moved(tmp_path / "out")
    assert "attention" in page and "embeddings" not in page and "feed-forward" not in page and "norms" not in page


def test_norms_over_all_of_a_part() -> None:
    old = {
        "a.attention.q.weight": torch.tensor([3.0, 0.0]),
        "b.attention.k.weight": torch.tensor([4.0]),
        "x": torch.zeros(2),
    }
    new = {
        "a.attention.q.weight": torch.tensor([3.0, 1.0]),
        "b.attention.k.weight": torch.tensor([4.0]),
        "x": torch.zeros(2),
    }
    (attention, other) = parts(old, new)
    assert (attention.name, attention.parameters, attention.moved) == ("attention", 3, pytest.approx(0.2))
    assert (other.name, other.moved) == ("other", 0.0)
