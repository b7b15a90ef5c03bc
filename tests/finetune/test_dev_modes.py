"""Other modes measured while a base without heads is trained: the figures of steps 0 to 2, and heads that learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import STEPS, run_script
from finetune.dev_data import dev_lines, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding import BGEM3FlagModel
from FlagEmbedding.modeling.heads import FIRST_WEIGHT, new_heads

MODES = ["sparse", "colbert", "dense+sparse+colbert"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dev(tmp_path_factory.mktemp("dev"), "ko", 60)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unified")
    write_rows(folder / "data/rows.jsonl", rows(24))
    words = train_words(
        tiny_model_dir, folder / "data", folder / "out", max_steps=2, unified_finetuning=True, eval_data_dir=dev,
        eval_steps=2, learning_rate=3e-3, colbert_dim=16, sentence_pooling_method="mean", save_strategy="no",
    )  # fmt: skip
    run_training([*words, "--eval_languages", "ko", "--eval_modes", "sparse", "colbert", "all"])
    return folder / "out"


def test_the_figures_of_every_mode_are_those_of_the_steps(trained: Path, dev: Path, tmp_path: Path) -> None:
    first, last = dev_lines(trained)
    assert (first["step"], last["step"]) == (0, 2)
    given: list[object] = ["--encoder", trained, "--languages", "ko", "--data_dir", dev]
    index, runs = ["--index_save_dir", tmp_path / "index"], tmp_path / "runs"
    answers = [
        run_script(STEPS[0], [*given, *index, "--modes", "all"]),
        run_script(STEPS[1], [*given, *index, "--result_save_dir", runs, "--modes", "dense", *MODES]),
        run_script(STEPS[2], [
            *given, "--search_result_save_dir", runs, "--qrels_dir", dev, "--eval_result_save_dir", tmp_path / "eval",
            "--metrics", "ndcg@10", "recall@100", "--modes", "dense", *MODES, "--resamples", "100",
        ]),
    ]  # fmt: skip
    assert [answer.returncode for answer in answers] == [0, 0, 0], answers[-1].stderr
    results: dict[str, Any] = json.loads((tmp_path / "eval/out/modes.json").read_text())["results"]
    for mode, by_lang in results.items():
        for measure, value in by_lang["ko"].items():
            name = measure if mode == "dense" else f"{mode}_{measure}"
            assert last[f"eval_{name}"] == pytest.approx(value, abs=1e-6), (mode, measure)
    assert len({last[f"eval_{mode}_ndcg@10"] for mode in MODES}) > 1
    # A head that gives every token the same weight finds words in common: above nothing before any step.
    assert first["eval_sparse_ndcg@10"] > 0.5


def test_new_heads_rank_and_have_a_gradient(trained: Path) -> None:
    colbert, sparse = new_heads(32, 16)
    states = torch.randn(50, 32, dtype=torch.float64)
    with torch.no_grad():
        weights = torch.relu(sparse.double()(states))
        assert weights.flatten().tolist() == pytest.approx([FIRST_WEIGHT] * 50)
    rows = colbert.weight.double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(new_heads(32, 32)[0](states.float()), states.float())
    # After two steps no text is without weights, and they are no longer one number.
    texts = [row["query"] for row in (json.loads(line) for line in (trained.parent / "data/rows.jsonl").open())]
    found = BGEM3FlagModel(str(trained)).encode(texts, return_sparse=True)["lexical_weights"]
    assert all(len(own) > 3 for own in found)
    assert len({round(weight, 4) for own in found for weight in own.values()}) > 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eval_modes sparse", "--eval_modes sparse needs --unified_finetuning True"),
        ("--unified_finetuning y --eval_modes bm25", "BM25 knows no model"),
        ("--unified_finetuning y --eval_modes all-tuned", "no queries to tune weights by"),
        ("--unified_finetuning y --eval_modes dance", "--eval_modes dance: expected dense"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: str, said: str, tiny_model_dir: Path, dev: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data/rows.jsonl", rows(4))
    given = train_words(tiny_model_dir, tmp_path / "data", tmp_path / "out", eval_data_dir=dev)
    answer = run_script("run.py", [*given, "--eval_languages", "ko", *words.split()])
    assert answer.returncode == 2 and said in answer.stderr
