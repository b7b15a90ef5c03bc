"""Negatives mined again while training: the files it leaves, exact continuation after kill -9, refusals."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune.helpers import REPOSITORY, environment, log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.checks import check_arguments
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.refresh import untouched_randomness
from FlagEmbedding.finetune.runner import run
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.utils.errors import DataError, UsageError

# 14 rows mixed, 2 a step: 7 steps an epoch, the negatives mined again before epochs 1 and 2.
OPTIONS: dict[str, Any] = {
    "max_steps": 16, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "train_group_size": 3,
    "refresh_negatives_every_n_epochs": 1, "refresh_range_for_sampling": "1-12", "dataloader_num_workers": 1,
    "learning_rate": 3e-3, "save_total_limit": None, "same_task_within_batch": False,
    "query_instruction_for_retrieval": "find: ", "passage_instruction_for_retrieval": "text: ",
    "sentence_pooling_method": "mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    records = rows(8, negatives=3)
    for record in records:
        record["neg_q"][2] = ""  # some passages are negatives only here, and nothing is known of what they answer
    write_rows(folder / "a.jsonl", records)
    write_rows(folder / "b.jsonl", rows(6, negatives=2, neg_q=False))
    return folder


@pytest.fixture(scope="module")
def whole(tiny_dropout_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("run") / "whole"
    run_training(train_words(tiny_dropout_dir, data, output, **OPTIONS))
    return output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def stable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("train_")} for line in lines]


def test_rows_stay_and_negatives_change(whole: Path, data: Path) -> None:
    assert sorted(p.name for p in (whole / "refresh").iterdir()) == ["corpus", "epoch-1", "epoch-2"]
    answered: dict[str, set[str]] = defaultdict(set)  # every query that a passage is said to answer
    for row in [*read(data / "a.jsonl"), *read(data / "b.jsonl")]:
        for text, query in [
            *zip(row["neg"], row.get("neg_q", []), strict=False),
            *((p, row["query"]) for p in row["pos"]),
        ]:
            answered[text] |= {query} - {""}
    outcomes: set[str] = set()
    for epoch in ("epoch-1", "epoch-2"):
        folder = whole / "refresh" / epoch
        assert sorted(p.name for p in folder.iterdir()) == ["000-a.jsonl", "001-b.jsonl", "refresh.json"]
        for name, original in (("000-a.jsonl", "a.jsonl"), ("001-b.jsonl", "b.jsonl")):
            before, after = read(data / original), read(folder / name)
            assert [(r["query"], r["pos"]) for r in before] == [(r["query"], r["pos"]) for r in after]
            assert any(set(b["neg"]) != set(a["neg"]) for b, a in zip(before, after, strict=True))
            for b, a in zip(before, after, strict=True):
                assert not set(a["neg"]) & set(a["pos"])
                if "neg_q" not in b:
                    assert "neg_q" not in a
                    continue
                own = dict(zip(b["neg"], b["neg_q"], strict=True))
                for negative, query in zip(a["neg"], a["neg_q"], strict=True):
                    others = answered[negative] - {b["query"]}
                    # One that stays keeps its query; where it had none, or is new, the files may know one.
                    assert query == own[negative] if own.get(negative) else query in (others or {""})
                    outcomes |= {"stays"} if own.get(negative) else {"known" if query else "missing"}
    assert outcomes == {"stays", "known", "missing"}


def test_the_negatives_are_those_that_the_checkpoint_finds_hard(whole: Path, data: Path) -> None:
    # Checkpoint 14 is the model that opened epoch 2.
    encoder = TextEncoder(EncoderArguments(encoder=str(whole / "checkpoint-14"), pooling_method="mean"))
    corpus = list(dict.fromkeys(t for f in ("a", "b") for r in read(data / f"{f}.jsonl") for t in r["pos"] + r["neg"]))
    vectors = encode_texts(encoder, [f"text: {text}" for text in corpus], 48)
    for row in read(whole / "refresh" / "epoch-2" / "000-a.jsonl"):
        scores = vectors @ encode_texts(encoder, [f"find: {row['query']}"], 24)[0]
        window = [corpus[i] for i in np.argsort(-scores)[1:12]]
        assert set(row["neg"]) <= set(window) - set(row["pos"])
        assert len(row["neg"]) == 3


def test_killed_and_resumed_equals_uninterrupted(
    whole: Path, tiny_dropout_dir: Path, data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    words = train_words(tiny_dropout_dir, data, broken, **OPTIONS)
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "run.py"), *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # In the middle of epoch 1, so that its files must be found again, and before epoch 2 is mined for.
    until = time.monotonic() + 240
    while not (broken / "checkpoint-10/trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_training([*words, "--resume_from_checkpoint", "True"])
    assert stable(log_lines(whole)) == stable(log_lines(broken))
    ours, theirs = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in ours)
    for path in (whole / "refresh").rglob("*.jsonl"):
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes()


def test_every_second_epoch_with_a_remainder_of_the_accumulation(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    """7 micro-batches an epoch, 2 a step: 4 steps an epoch, the last of a single one."""
    options = {**OPTIONS, "save_strategy": "no", "max_steps": 17, "gradient_accumulation_steps": 2}
    options |= {"refresh_negatives_every_n_epochs": 2}
    run_training(train_words(tiny_model_dir, data, tmp_path, **options))
    assert sorted(path.name for path in (tmp_path / "refresh").iterdir()) == ["corpus", "epoch-2", "epoch-4"]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "refresh_epoch" in line]
    assert [(line["refresh_epoch"], line["step"]) for line in lines] == [(2.0, 8), (4.0, 16)]
    assert all(0 <= line["refresh_kept"] < 1 and len(line["refresh_sha256"]) == 64 for line in lines)


@pytest.mark.parametrize("damage", ["is missing or damaged", "belongs to another run"])
def test_files_that_the_epoch_was_not_trained_on_are_refused(
    whole: Path, tiny_dropout_dir: Path, data: Path, tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(whole / "checkpoint-10", output / "checkpoint-10")
    if damage.startswith("belongs"):  # whole files, but those of the epoch after
        shutil.copytree(whole / "refresh/epoch-2", output / "refresh/epoch-1")
    else:
        shutil.copytree(whole / "refresh/epoch-1", output / "refresh/epoch-1")
        with open(output / "refresh/epoch-1/000-a.jsonl", "a") as stream:
            stream.write("\n")
    words = train_words(tiny_dropout_dir, data, output, **OPTIONS, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match=f"epoch-1: the negatives that epoch 1 was trained on: {damage}"):
        run(parse_arguments(words))


def test_a_refresh_takes_no_random_number_from_training() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(1)), random.random(), float(np.random.random())]

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    found = [draw()]
    with untouched_randomness():
        draw()
    assert [*found, draw()] == expected
    assert len({number for part in expected for number in part}) == 6


def test_replaced_files_must_have_as_many_rows(tmp_path: Path) -> None:
    dataset = TrainDataset(DataArguments([str(write_rows(tmp_path / "a.jsonl", rows(4)))]))
    fewer = write_rows(tmp_path / "b.jsonl", rows(3))
    with pytest.raises(DataError, match="3 rows in place of 4"):
        dataset.replace_files([fewer])
    dataset.replace_files([write_rows(tmp_path / "c.jsonl", list(reversed(rows(4))))])
    assert dataset[(0, 0)].query == rows(4)[3]["query"]
    assert dataset[(0, 0)].row.endswith("c.jsonl:1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"refresh_negatives_every_n_epochs": -1}, "must be 0"),
        ({"refresh_negatives_every_n_epochs": 0}, "--refresh_range_for_sampling has no effect"),
        ({"refresh_range_for_sampling": "30-2"}, "give two ranks such as 2-30"),
        ({"max_steps": -1, "num_train_epochs": 1}, "has no effect in 1 epoch"),
        ({"knowledge_distillation": True}, "belong to the negatives that are exchanged"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "keep the old rows"),
        ({"train_group_size": 1}, "draws no negatives"),
        ({"refresh_corpus": "/nowhere.jsonl"}, "--refresh_corpus /nowhere.jsonl: there is no such file"),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    words = train_words(tmp_path / "model", tmp_path / "rows", tmp_path / "out", **{**OPTIONS, **changes})
    with pytest.raises(UsageError, match=expected):
        check_arguments(parse_arguments(words))


def test_a_faulty_corpus_stops_the_run_before_its_first_step(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"docid": "a", "text": "one"}, {"docid": "b"}])
    words = train_words(tiny_model_dir, data, tmp_path / "out", **OPTIONS, refresh_corpus=corpus)
    with pytest.raises(DataError, match=r"corpus.jsonl:2: expected a string as 'text'"):
        run(parse_arguments(words))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
