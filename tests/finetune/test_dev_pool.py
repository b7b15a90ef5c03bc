"""Pools of passages: of a collection by what the base finds, and of training rows that are held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import by_the_steps, dev_lines, write_dev
from finetune.helpers import opened, rows, run_training, train_words, write_rows

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.trec import read_run
from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.dev.arguments import EvaluationArguments
from FlagEmbedding.finetune.dev.held_out import hold_out

OPTIONS: dict[str, Any] = {
    "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3, "eval_steps": 2,
    "same_task_within_batch": False,
}  # fmt: skip
POOLED = ["pooled_ndcg@10", "pooled_recall@20", "pooled_mrr@10"]
METRICS = ["--eval_metrics", "ndcg@10", "recall@20", "mrr@10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(30))
    write_rows(folder / "b.jsonl", [*rows(10), {**rows(1)[0], "pos": ["Another answer to the first question."]}])
    return folder


def docids(corpus: list[Path]) -> set[str]:
    return {passage.docid for path in corpus for passage in read_file(path)}


def test_a_pool_is_judged_mined_and_random(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    dev, output = write_dev(tmp_path / "dev", "ko", 400, queries=8), tmp_path / "out"
    words = train_words(tiny_model_dir, data, output, **OPTIONS, eval_data_dir=dev, eval_corpus="pool",
                        eval_pool_mined=5, eval_pool_random=30)  # fmt: skip
    answer = run_training([*words, "--eval_languages", "ko", *METRICS])
    pool = Source("ko", data_dir=output / "dev/pool")
    by_the_steps(tiny_model_dir, dev, ["ko"], tmp_path / "whole")
    run = read_run(next((tmp_path / "whole").rglob("runs/**/ko.txt")))
    qrels = pool.qrels()
    judged = {docid for own in qrels.values() for docid in own}
    mined = {docid for qid in qrels for docid in list(run[qid])[:5]}
    assert judged | mined <= docids(pool.corpus()) < docids(Source("ko", data_dir=dev).corpus())
    assert len(docids(pool.corpus())) == len(judged | mined) + 30
    assert pool.topics() == Source("ko", data_dir=dev).topics()
    lines = dev_lines(output)
    for line, checkpoint in zip(lines, (tiny_model_dir, output / "checkpoint-2"), strict=True):
        steps = by_the_steps(checkpoint, output / "dev/pool", ["ko"], tmp_path / "pool")
        assert {f"pooled_{key}": value for key, value in steps["average"].items()} == {
            key: line[f"eval_{key}"] for key in POOLED
        }
        assert not [key for key in line if key.startswith("eval_") and "pooled" not in key and key != "eval_seconds"]
    said = [each for each in answer.stderr.splitlines() if "nDCG@10" in each]
    assert len(said) == 2 and all("pooled nDCG@10" in each for each in said)
    assert json.loads((output / "training_args.json").read_text())["training"]["metric_for_best_model"] == POOLED[0]
    # Mining costs the whole corpus: what lies there is taken again.
    again = run_training([*words, "--eval_languages", "ko", *METRICS, "--resume_from_checkpoint", "True"])
    assert "goes through the base once" in answer.stderr and "goes through the base once" not in again.stderr


def test_held_out_rows_are_searched_for_and_never_trained_on(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = train_words(tiny_model_dir, data, output, **{**OPTIONS, "max_steps": 40, "save_steps": 40}, eval_rows=0.25,
                        eval_pool_random=10)  # fmt: skip
    run_training([*words, *METRICS])
    held = Source("rows", data_dir=output / "dev/held_out")
    topics, qrels = held.topics(), held.qrels()
    assert set(topics) == set(qrels) and 5 <= len(topics) <= 10
    # Steps 0 to 2 know MIRACL's languages alone.
    for kind in ("miracl-corpus-v1.0", "miracl-v1.0"):
        shutil.copytree(output / f"dev/held_out/{kind}-rows", tmp_path / f"dev/{kind}-ko")
    for kind, path in (("topics", held.topics_file()), ("qrels", held.qrels_file())):
        shutil.copy(path, tmp_path / f"dev/miracl-v1.0-ko/{kind}/{kind}.miracl-v1.0-ko-dev.tsv")
    steps = by_the_steps(output / "checkpoint-40", tmp_path / "dev", ["ko"], tmp_path / "steps")
    line = dev_lines(output)[-1]
    assert {f"pooled_{key}": value for key, value in steps["ko"].items()} == {
        key: line[f"eval_{key}"] for key in POOLED
    }


def test_every_row_of_a_held_out_query_is_held_out(data: Path, tmp_path: Path) -> None:
    dataset = opened([data], DataArguments(train_data=[]))
    before = {int(row): dataset.record(int(row))[1].query for task in dataset.tasks for row in task.rows}
    files = hold_out(dataset, EvaluationArguments(eval_rows=6, eval_pool_random=4), tmp_path)
    left = {int(row) for task in dataset.tasks for row in task.rows}
    topics, qrels = files.topics(), files.qrels()
    assert {before[row] for row in left}.isdisjoint(topics.values())
    assert {query for row, query in before.items() if row not in left} == set(topics.values())
    assert len(before) - len(left) >= 6 >= len(topics)
    passages = {p.docid: p.text for p in read_file(files.corpus()[0])}
    held = [dataset.record(row)[1] for row in before if row not in left]
    for record in held:
        qid = next(qid for qid, query in topics.items() if query == record.query)
        assert set(record.pos) <= {passages[docid] for docid in qrels[qid]}
        assert set(record.neg) <= set(passages.values())
    own = {text for record in held for text in (*record.pos, *record.neg)}
    assert len(passages) == len(own) + 4
    again = opened([data], DataArguments(train_data=[]))
    hold_out(again, EvaluationArguments(eval_rows=6, eval_pool_random=4), tmp_path / "again")
    assert Source("rows", data_dir=tmp_path / "again").corpus()[0].read_bytes() == files.corpus()[0].read_bytes()
    other = opened([data], DataArguments(train_data=[]), seed=8)
    hold_out(other, EvaluationArguments(eval_rows=6, eval_pool_random=4), tmp_path / "other")
    assert Source("rows", data_dir=tmp_path / "other").topics() != topics
