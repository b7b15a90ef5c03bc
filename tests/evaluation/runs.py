"""Runs of two models and their judgments, and step 2's published command on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from FlagEmbedding.evaluation.__main__ import eval_dense
from FlagEmbedding.utils.cli import entry_point

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = (
    "--encoder CreaLabs/bge-m3-fa-CLPL-outputMoE --languages ko --search_result_save_dir ./search_results --qrels_dir "
    "./qrels --eval_result_save_dir ./eval_results --metrics ndcg@5 ndcg@10 --pooling_method cls "
    "--normalize_embeddings True"
)
NAME = "bge-m3-fa-CLPL-outputMoE"
QUERIES = {f"{i}-0": f"질문 {i} | 한강" for i in range(12)}


def write_run(path: Path, rank: int, queries: Sequence[str] = tuple(QUERIES), depth: int = 20) -> None:
    """A run with the relevant passage of query i at ``rank`` + i % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, qid in enumerate(queries):
        for place in range(1, depth + 1):
            docid = f"{qid}#right" if place == rank + number % 3 else f"{place}#0"
            lines.append(f"{qid} Q0 {docid} {place} {1 - place / 100:.6f} Faiss\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_runs(folder: Path) -> None:
    """Runs of two models in two languages, the judgments under their published name, topics and passages."""
    for lang in ("ko", "fa"):
        write_run(folder / f"search_results/{NAME}/{lang}.txt", 1)
        write_run(folder / f"search_results/base/{lang}.txt", 4)
        path = folder / f"qrels/miracl-v1.0-{lang}_qrels_qrels.miracl-v1.0-{lang}-dev.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{qid}\tQ0\t{qid}#right\t1\n{qid}\tQ0\t7#0\t0\n" for qid in QUERIES))
        topics = folder / f"data/miracl-v1.0-{lang}/topics/topics.miracl-v1.0-{lang}-dev.tsv"
        topics.parent.mkdir(parents=True)
        topics.write_text("".join(f"{qid}\t{text}\n" for qid, text in QUERIES.items()), encoding="utf-8")
        corpus = folder / f"data/miracl-corpus-v1.0-{lang}/docs-0.jsonl"
        corpus.parent.mkdir()
        texts = {**{f"{qid}#right": f"답 {qid}" for qid in QUERIES}, **{f"{i}#0": f"passage {i}" for i in range(1, 21)}}
        corpus.write_text("".join(json.dumps({"docid": d, "title": "", "text": t}) + "\n" for d, t in texts.items()))


def step2(*words: str) -> int:
    """Exit code of the published command with ``words`` added."""
    return entry_point(eval_dense)([*PUBLISHED.split(), *words])


def ndcg(rank: int, cutoff: int) -> float:
    """The mean nDCG@cutoff of a run that ``write_run`` wrote."""
    values = [1 / np.log2(1 + rank + i % 3) if rank + i % 3 <= cutoff else 0.0 for i in range(len(QUERIES))]
    return float(np.mean(values))


RECORD = {
    "arguments": {"split": "dev", "hits": 20, "index_type": "Flat", "data_dir": "data"},
    "encoder": {"model": "abc", "pooling": "cls", "normalize_embeddings": True, "dtype": "fp32"},
    "index": {"rows": 1000, "with_title": False, "passage_instruction": None, "max_passage_length": 512},
    "query_instruction": "query: ",
}
