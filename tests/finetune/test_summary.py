"""What run.py prints at its end: the losses by term, the routers, and lines that do use the checkpoint as trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows

from FlagEmbedding import FlagModel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data" / "rows.jsonl", rows(12)).parent


def printed_lines(words: list[str], start: str) -> str:
    """The printed line that begins with ``start``."""
    (line,) = [line.strip() for line in run_training(words).stdout.splitlines() if line.strip().startswith(start)]
    return line


def test_the_printed_lines_use_the_checkpoint_as_it_was_trained(
    tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    words = train_words(
        tiny_model_dir, data, tmp_path / "out", max_steps=1, sentence_pooling_method="mean", normlized=False,
        query_instruction_for_retrieval="query: it's ", passage_instruction_for_retrieval="passage: ",
    )  # fmt: skip
    printed = run_training(words).stdout
    first, second = (part.strip() for part in printed.split("Use it:")[1].split("\nor\n"))
    names = {"SentenceTransformer": SentenceTransformer}
    exec("\n".join(line.strip() for line in first.splitlines()), names)
    plain = FlagModel(str(tmp_path / "out"), pooling_method="mean", normalize_embeddings=False)
    queries, passages = plain.encode(["query: it's a river"]), plain.encode(["passage: a river"])
    assert abs(queries - passages).max() > 1e-2
    np.testing.assert_allclose(names["model"].encode_queries(["a river"]), queries, atol=1e-6)
    np.testing.assert_allclose(names["model"].encode_corpus(["a river"]), passages, atol=1e-6)
    other = eval(second, names)
    np.testing.assert_allclose(other.encode("a river", prompt_name="query"), queries[0], atol=1e-5)
    np.testing.assert_allclose(other.encode("a river", prompt_name="document"), passages[0], atol=1e-5)


def test_without_instructions_none_is_named(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    line = printed_lines(train_words(tiny_model_dir, data, tmp_path / "out", max_steps=1), "model = ")
    folder = str(tmp_path / "out")
    assert line == f"model = FlagModel({folder!r}, pooling_method='cls', normalize_embeddings=True)"


def test_tables_show_the_first_and_last_line_of_the_log(tiny_moe_dir: Path, data: Path, tmp_path: Path) -> None:
    answer = run_training(train_words(tiny_moe_dir, data, tmp_path / "out", max_steps=3, router_z_loss_coef=0.1))
    first, _, last = log_lines(tmp_path / "out")
    cells = [line.rsplit(maxsplit=2) for line in answer.stdout.splitlines()]
    for title, name in (
        ("loss (what is minimized)", "loss"),
        ("contrastive loss", "contrastive_loss"),
        ("penalty: mean 1 − cos(negative, its own query)", "penalty"),
        ("router load balance loss", "router_aux_loss"),
        ("router z-loss", "router_z_loss"),
        ("router z loss scaled", "router_z_loss_scaled"),
    ):
        assert [title, f"{first[name]:.4f}", f"{last[name]:.4f}"] in cells
    titles = {line[0] for line in cells if line}
    assert not titles & {"grad norm", "learning rate", "epoch", "router load min", "router changed", "router entropy"}
    assert "Routers at step 3" in answer.stdout
    layers = [line.split() for line in answer.stdout.split("Routers at step 3")[1].splitlines()[3:5]]
    for number, (layer, load, entropy, changed) in enumerate(
        zip(
            layers, last["router_load"], last["router_entropy_per_layer"], last["router_changed_per_layer"], strict=True
        )
    ):
        assert layer == [str(number), *(f"{share:.1%}" for share in load), f"{entropy:.3f}", f"{changed:.1%}"]
    assert "3 steps in" in answer.stdout and "trust_remote_code=True" in answer.stdout
