"""The published commands one after another, run.py to step 2, each result against plain transformers and arithmetic.

Options that one command writes into its files and the next one must honour (pooling, experts, heads, instructions) are
given once, to the command that the user would give them to.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import STEPS, run_script
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding import BGEM3FlagModel, BGEM3Model, FlagModel
from tests.evaluation.conftest import QUERIES

Vectors = Callable[..., np.ndarray]


def step(number: int, words: list[object]) -> str:
    answer = run_script(STEPS[number], words)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def texts_of(collection: Path) -> dict[str, str]:
    found = {}
    for path in sorted((collection / "miracl-corpus-v1.0-ko").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found |= {row["docid"]: f"{row['title']} {row['text']}" for row in map(json.loads, lines)}
    return found


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model trained with mean pooling, its last checkpoint saved half way too."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "data" / "rows.jsonl", rows(16))
    run_training(train_words(
        tiny_model_dir, folder / "data", folder / "model", sentence_pooling_method="mean", max_steps=2,
        save_strategy="steps", save_steps=1, learning_rate=3e-3,
    ))  # fmt: skip
    yield folder / "model"


def test_from_training_to_scores(trained: Path, collection: Path, tmp_path: Path, reference_vectors: Vectors) -> None:
    data = ["--encoder", trained, "--languages", "ko", "--data_dir", collection]
    step(0, [*data, "--index_save_dir", tmp_path / "index", "--with_title", "--max_passage_length", "20",
             "--passage_instruction_for_retrieval", "passage: "])  # fmt: skip
    step(1, [*data, "--index_save_dir", tmp_path / "index", "--result_save_dir", tmp_path / "runs", "--hits", "12",
             "--query_instruction_for_retrieval", "query: ", "--max_query_length", "10"])  # fmt: skip
    texts = texts_of(collection)
    passages = reference_vectors(trained, [f"passage: {text}" for text in texts.values()], 20, "mean")
    queries = reference_vectors(trained, [f"query: {query}" for query in QUERIES.values()], 10, "mean")
    scores = queries.astype(np.float64) @ passages.astype(np.float64).T
    run: dict[str, list[tuple[str, float]]] = {}
    for line in (tmp_path / "runs/model/ko.txt").read_text().splitlines():
        qid, _, docid, _, score, _ = line.split()
        run.setdefault(qid, []).append((docid, float(score)))
    assert list(run) == list(QUERIES)
    docids, gains = list(texts), []
    relevant = run[next(iter(QUERIES))][1][0]  # what every query is judged to want: the first one's second hit
    for row, hits in zip(scores, run.values(), strict=True):
        order = sorted(zip(row, docids, strict=True), reverse=True)[:12]
        assert [score for _, score in hits] == pytest.approx([score for score, _ in order], abs=1e-5)
        rank = [docid for docid, _ in hits].index(relevant) + 1 if relevant in dict(hits) else None
        gains.append(1 / np.log2(1 + rank) if rank and rank <= 10 else 0.0)

    qrels = tmp_path / "ko.tsv"
    qrels.write_text("".join(f"{qid}\tQ0\t{relevant}\t1\n" for qid in QUERIES))
    step(2, ["--encoder", trained, "--languages", "ko", "--search_result_save_dir", tmp_path / "runs", "--qrels_dir",
             qrels, "--eval_result_save_dir", tmp_path / "scores"])  # fmt: skip
    result = json.loads((tmp_path / "scores/model.json").read_text())
    assert result["results"]["ko"]["ndcg@10"] == pytest.approx(np.mean(gains))
    assert 0 < np.mean(gains) < 1
    # What the run came from, read from what the other commands left.
    assert (result["pooling_method"], result["model"]) == ("mean", str(trained))
    origin = result["runs"]["ko"]
    assert {key: origin[key] for key in ("query_instruction", "passage_instruction", "with_title", "hits")} == {
        "query_instruction": "query: ", "passage_instruction": "passage: ", "with_title": True, "hits": 12,
    }  # fmt: skip
    assert (origin["max_passage_length"], origin["corpus_passages"]) == (20, len(texts))


def test_a_checkpoint_on_the_way_has_a_name_and_vectors_of_its_own(
    trained: Path, collection: Path, tmp_path: Path, reference_vectors: Vectors
) -> None:
    for model in (trained, trained / "checkpoint-1"):
        step(0, ["--encoder", model, "--languages", "fa", "--data_dir", collection, "--index_save_dir", tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model_checkpoint-1"]
    contents = [(tmp_path / name / "fa/index").read_bytes() for name in ("model", "model_checkpoint-1")]
    assert contents[0] != contents[1]
    # The index of one is refused to the other.
    (tmp_path / "model/fa").rename(tmp_path / "model/kept")
    (tmp_path / "model_checkpoint-1/fa").rename(tmp_path / "model/fa")
    words = ["--encoder", trained, "--languages", "fa", "--data_dir", collection, "--index_save_dir", tmp_path]
    answer = run_script(STEPS[1], [*words, "--result_save_dir", tmp_path / "runs"])
    assert answer.returncode == 2
    assert "was made by another encoder (model: " in answer.stderr


@pytest.mark.parametrize("normalize", [True, False])
def test_what_training_scores_is_what_inference_scores(normalize: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Experts, heads, pooling and normalization of a run, asked of the classes that load its folder by path alone."""
    write_rows(tmp_path / "data" / "rows.jsonl", rows(16))
    folder = tmp_path / "model"
    run_training(train_words(
        tiny_model_dir, tmp_path / "data", folder, max_steps=2, unified_finetuning=True, colbert_dim=24,
        moe="output", num_experts=2, num_experts_per_tok=2, sentence_pooling_method="mean", learning_rate=3e-3,
        normalize_embeddings=normalize, temperature=0.02 if normalize else 1.0,
    ))  # fmt: skip
    record = rows(3)[2]
    pairs = [(record["query"], text) for text in record["pos"] + record["neg"]]
    training = BGEM3Model(
        str(folder), normlized=normalize, sentence_pooling_method="mean", unified_finetuning=True, penalty_weight=0
    ).eval()
    assert training.colbert_linear is not None and training.colbert_linear.out_features == 24
    query = training.tokenizer([record["query"]], return_tensors="pt")
    passage = training.tokenizer([text for _, text in pairs], padding=True, return_tensors="pt")
    output = training(*({key: batch[key] for key in ("input_ids", "attention_mask")} for batch in (query, passage)))
    settings = {"normalize_embeddings": normalize}  # the pooling is the folder's own word
    flag = FlagModel(str(folder), **settings)
    vectors = np.asarray(flag.encode_corpus([text for _, text in pairs]))
    np.testing.assert_allclose(vectors, output.p_reps.detach().numpy(), atol=2e-6)
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5) == normalize
    scores = BGEM3FlagModel(str(folder), **settings).compute_score(pairs)
    temperature = training.temperature
    assert isinstance(scores, dict)
    np.testing.assert_allclose(scores["dense"], temperature * output.scores[0].detach().numpy(), rtol=1e-4)
    assert len({round(score, 4) for score in scores["colbert"]}) > 2
    assert max(scores["sparse"]) > 0
