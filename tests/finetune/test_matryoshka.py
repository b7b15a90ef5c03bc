"""--matryoshka_dims in run.py: losses, the report by width, what the checkpoint says, encoding at a width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import STEPS, run_script
from conftest import write_tiny
from finetune.dev_data import dev_lines, write_dev
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.negatives import FalseNegatives, add_neg_q
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.losses.matryoshka import Widths
from FlagEmbedding.losses.objective import ObjectiveArguments, Terms
from FlagEmbedding.utils.errors import UsageError

TEXTS = ["When do people visit the river of Seoul?", "The tower of Shiraz"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data/a.jsonl", rows(24)).parent


def train(model: Path, data: Path, output: Path, words: str, **options: Any) -> Any:
    return run_training([*train_words(model, data, output, **options), *words.split()])


def test_a_run_with_dev_queries(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    dev, out = write_dev(tmp_path / "dev", "ko", 60), tmp_path / "out"
    words = f"--matryoshka_dims 32 16 8 --eval_data_dir {dev} --eval_languages ko --report True"
    train(tiny_model_dir, data, out, words, max_steps=2, eval_steps=1)
    line = log_lines(out)[-1]
    for name in ("contrastive_loss", "penalty"):
        assert line[name] == pytest.approx(sum(line[f"{name}_{dim}"] for dim in (32, 16, 8)) / 3, rel=1e-5)
    assert line["loss"] == pytest.approx(0.9 * line["contrastive_loss"] + 0.1 * line["penalty"], rel=1e-4)
    assert json.loads((out / "config.json").read_text("utf-8"))["matryoshka_dimensions"] == [32, 16, 8]
    page = (out / "report.md").read_text("utf-8")
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.split("By width")[1].split("\n")[2:7]]
    assert [row[0] for row in table[2:]] == ["32", "16", "8"]
    evaluations = dev_lines(out)
    shown = [f"{100 * evaluations[place]['eval_ndcg@10']:.1f}" for place in (0, -1)]
    assert table[2][1:3] == shown  # the full width is what the log says
    # A width's figure is that of steps 0 to 2 with --truncate_dim.
    common = ["--encoder", out, "--languages", "ko", "--data_dir", dev, "--truncate_dim", "8"]
    index, runs = ["--index_save_dir", tmp_path / "index"], ["--result_save_dir", tmp_path / "runs"]
    scores = ["--search_result_save_dir", tmp_path / "runs", "--eval_result_save_dir", tmp_path / "eval"]
    for step, more in ((0, [*common, *index]), (1, [*common, *index, *runs])):
        answer = run_script(STEPS[step], more)
        assert answer.returncode == 0, answer.stderr[-2000:]
    scores += ["--qrels_dir", tmp_path, "--metrics", "ndcg@10", *common[:6]]
    answer = run_script(STEPS[2], scores)
    assert answer.returncode == 0, answer.stderr[-2000:]
    (result,) = (tmp_path / "eval").glob("*.json")
    value = json.loads(result.read_text())["results"]["ko"]["ndcg@10"]
    assert table[4][2] == f"{100 * value:.1f}"
    # An index of another width is not searched.
    answer = run_script(STEPS[1], [*common[:-1], "16", *index, *runs, "--overwrite", "True"])
    assert answer.returncode == 2
    assert "dimension: 8 there, 16 here" in answer.stderr


def test_it_changes_what_is_trained_and_the_caching_of_gradients_nothing(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    losses = {}
    for name, words in {
        "plain": "",
        "full": "--matryoshka_dims 32",
        "dims": "--matryoshka_dims 16 4 --matryoshka_weights 1 2",
        "cached": "--matryoshka_dims 16 4 --matryoshka_weights 1 2 --grad_cache True --slab_tokens 64",
    }.items():
        unified = "--unified_finetuning True --use_self_distill True --max_steps 2 "
        train(tiny_model_dir, data, tmp_path / name, unified + words)
        losses[name] = [line["loss"] for line in log_lines(tmp_path / name)]
    assert losses["full"][0] == losses["plain"][0]  # then gradients are added up in another order
    assert losses["full"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["dims"] != losses["plain"]
    assert losses["cached"] == pytest.approx(losses["dims"], rel=1e-5)
    # Trained on without widths, a checkpoint no longer claims them.
    answer = train(tmp_path / "dims", data, tmp_path / "later", "--max_steps 1")
    assert "--matryoshka_dims keeps them" in answer.stderr
    assert not json.loads((tmp_path / "later/config.json").read_text("utf-8")).get("matryoshka_dimensions")


@pytest.mark.parametrize(
    "options", [{"neg_q_as_rows": True}, {"neg_q_control": "unused"}, {"neg_q_control": "positive"}]
)
def test_what_the_negatives_queries_add_is_a_mean_over_widths(options: dict[str, Any]) -> None:
    """Penalty and pairs at two widths are the mean of what each width adds by itself."""
    draw = torch.Generator().manual_seed(3)
    vectors = [torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (2, 6, 3)]
    owner, objective = torch.tensor([1, 2, 4]), ObjectiveArguments(penalty_weight=0.3, **options)

    def added(given: list[torch.Tensor], widths: Widths | None) -> Terms:
        nothing = {"loss": torch.zeros((), dtype=torch.float64)}
        found = FalseNegatives(objective, None, None)
        return add_neg_q(nothing, (given[0], given[1], given[2]), owner, found, objective, 0.1, widths)

    widths = Widths((8, 4), (0.25, 0.75), normalize=True)
    both = added([torch.nn.functional.normalize(v, dim=-1) for v in vectors], widths)
    alone = [added([torch.nn.functional.normalize(v[:, :dim], dim=-1) for v in vectors], None) for dim in (8, 4)]
    for name in {"loss", "penalty", "pair_rows"} & alone[0].keys():
        expected = 0.25 * alone[0][name] + 0.75 * alone[1][name]
        torch.testing.assert_close(both[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_encoding_at_a_width(tiny_model_dir: Path, normalize: bool) -> None:
    encoder = TextEncoder(EncoderArguments(encoder=str(tiny_model_dir), truncate_dim=8, normalize_embeddings=normalize))
    whole = FlagModel(str(tiny_model_dir), normalize_embeddings=normalize).encode(TEXTS)
    cut = encode_texts(encoder, TEXTS, 512)
    expected = whole[:, :8] / (np.linalg.norm(whole[:, :8], axis=1, keepdims=True) if normalize else 1)
    np.testing.assert_allclose(cut, expected, rtol=0, atol=1e-6)
    published = FlagModel(str(tiny_model_dir), normalize_embeddings=normalize, truncate_dim=8).encode(TEXTS)
    np.testing.assert_array_equal(cut, published)
    with pytest.raises(UsageError, match="--truncate_dim 33"):
        TextEncoder(EncoderArguments(encoder=str(tiny_model_dir), truncate_dim=33))
    with pytest.raises(UsageError, match="--truncate_dim must be at least 1"):
        EncoderArguments(encoder="x", truncate_dim=0)


@pytest.mark.parametrize("dims", ["0", "64 32", "16 16", "8 16"])
def test_wrong_widths_are_refused_before_anything_is_read(dims: str, data: Path, tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", "bert")
    (base / "model.safetensors").unlink()  # nobody gets as far as the weights
    words = [*train_words(base, data, tmp_path / "out"), "--matryoshka_dims", *dims.split()]
    answer = run_training(words, check=False)
    assert answer.returncode == 2
    assert "--matryoshka_dims" in answer.stderr
    assert "Traceback" not in answer.stderr
