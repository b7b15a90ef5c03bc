"""A dev collection in MIRACL's layout beside training rows of the same texts, and what steps 0 to 2 make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from commands import STEPS, run_script
from finetune.helpers import rows

from FlagEmbedding.collections.writing import write_collection

MEASURES = ["ndcg@10", "recall@20", "mrr@10"]


def write_dev(root: Path, lang: str, passages: int, queries: int = 20, seed: int = 0, split: str = "dev") -> Path:
    """``passages`` passages, of which every query has one or two relevant ones; some queries are not judged."""
    generator = np.random.default_rng(seed)
    records = rows(72)
    texts = [(f"{i}#0", f"title {i}", records[i % 72]["pos"][0] + f" Number {i}.") for i in range(passages)]
    topics, qrels = {}, {}
    for i in range(queries):
        # The end of a passage, so that an encoder which knows nothing finds some of them.
        asked, other, wrong = (int(number) for number in generator.integers(passages, size=3))
        topics[f"q{i}"] = texts[asked][2][40:]
        qrels[f"q{i}"] = {texts[wrong][0]: 0, texts[other][0]: 1, texts[asked][0]: 2}
    for i in range(min(2, queries - 1)):
        del qrels[f"q{i}"]
    write_collection(root, lang, texts, topics, qrels, split)
    return root


def by_the_steps(
    checkpoint: Path, data_dir: Path, languages: list[str], place: Path, metrics: list[str] = MEASURES, *more: object
) -> dict[str, dict[str, float]]:
    """language -> measure -> value of a checkpoint, by the real step 0, 1 and 2."""
    common = ["--encoder", checkpoint, "--languages", *languages, "--data_dir", data_dir]
    place = place / checkpoint.name
    index, found = ["--index_save_dir", place / "index"], ["--result_save_dir", place / "runs"]
    scores = ["--search_result_save_dir", place / "runs", "--eval_result_save_dir", place / "eval"]
    scores += ["--qrels_dir", place]
    for step, words in (
        (0, [*common, *index, *more]),
        (1, [*common, *index, *found, *(more if set(more) & {"--dtype", "--normalize_embeddings"} else [])]),
        (2, [*common, *scores, "--metrics", *metrics]),
    ):
        answer = run_script(STEPS[step], words)
        assert answer.returncode == 0, answer.stderr[-2000:]
    (result,) = (place / "eval").glob("*.json")
    return dict(json.loads(result.read_text())["results"])


def history(output: Path) -> list[dict[str, Any]]:
    return list(json.loads((output / "trainer_state.json").read_text())["log_history"])


def dev_lines(output: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's log."""
    return [line for line in history(output) if "eval_seconds" in line]


def losses(output: Path) -> list[dict[str, Any]]:
    """The loss lines of a run's log."""
    return [line for line in history(output) if "loss" in line]
