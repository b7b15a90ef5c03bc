"""Builds the sample data in ``data/sample`` out of the passages and queries in ``data/sample_source``.

    python data/build_sample.py [OUTPUT]

One source file a language, one passage a line: docid, topic, split (train or dev), title, text, queries. Passages of
one topic are near misses of each other. Written are, per language:

- MIRACL's layout: the corpus (all passages), topics and qrels of train and dev. The other passages of a topic are
  judged with grade 0, as MIRACL judges passages that do not answer;
- ``train/{lang}_CLPL_train_data.jsonl``: a row for each train query with hard negatives (first the topic's other train
  passages, then train passages of other topics) and, for each negative, one of its own queries (``neg_q``);
- ``train_random/{lang}_random_train_data.jsonl``: the same rows with negatives drawn at random.

No dev passage and no dev query is in a training file. The output is a function of the source, byte for byte.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "sample_source"
NEGATIVES = 7
SEED = 42

Passage = dict[str, Any]


def read_source(path: Path) -> list[Passage]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_corpus(path: Path, passages: list[Passage]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{key: passage[key] for key in ("docid", "title", "text")} for passage in passages]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Without name and time in the header the file depends on its content alone.
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def query_id(passage: Passage, number: int) -> str:
    return f"{passage['docid']}-q{number}"


def write_topics_and_qrels(folder: Path, lang: str, passages: list[Passage]) -> None:
    topics: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        topics[passage["topic"]].append(passage)
    for split in ("train", "dev"):
        queries, judgements = [], []
        for passage in passages:
            if passage["split"] != split:
                continue
            for number, query in enumerate(passage["queries"], 1):
                qid = query_id(passage, number)
                queries.append(f"{qid}\t{query}")
                judgements.append(f"{qid}\tQ0\t{passage['docid']}\t1")
                others = [other for other in topics[passage["topic"]] if other is not passage]
                judgements += [f"{qid}\tQ0\t{other['docid']}\t0" for other in others]
        write_lines(folder / "topics" / f"topics.miracl-v1.0-{lang}-{split}.tsv", queries)
        write_lines(folder / "qrels" / f"qrels.miracl-v1.0-{lang}-{split}.tsv", judgements)


def training_rows(lang: str, passages: list[Passage], hard: bool) -> list[str]:
    train = [passage for passage in passages if passage["split"] == "train"]
    rows = []
    for passage in train:
        for number, query in enumerate(passage["queries"], 1):
            # Seeding by text is the same on every platform.
            generator = random.Random(f"{SEED}/{query_id(passage, number)}/{hard}")
            near = [other for other in train if other["topic"] == passage["topic"] and other is not passage]
            far = [other for other in train if other["topic"] != passage["topic"]]
            pool = near + generator.sample(far, NEGATIVES) if hard else generator.sample(near + far, NEGATIVES)
            negatives = pool[:NEGATIVES]
            row = {
                "query": query,
                "pos": [passage["text"]],
                "neg": [other["text"] for other in negatives],
                "neg_q": [generator.choice(other["queries"]) for other in negatives],
            }
            rows.append(json.dumps(row, ensure_ascii=False))
    return rows


def build(output: Path, source: Path = SOURCE) -> list[str]:
    """Write the sample of every language in ``source`` to ``output``; returns the languages."""
    languages = []
    for path in sorted(source.glob("*.jsonl")):
        lang = path.stem
        passages = read_source(path)
        write_corpus(output / f"miracl-corpus-v1.0-{lang}" / "docs-0.jsonl.gz", passages)
        write_topics_and_qrels(output / f"miracl-v1.0-{lang}", lang, passages)
        write_lines(output / "train" / f"{lang}_CLPL_train_data.jsonl", training_rows(lang, passages, hard=True))
        write_lines(
            output / "train_random" / f"{lang}_random_train_data.jsonl", training_rows(lang, passages, hard=False)
        )
        languages.append(lang)
    return languages


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sample"
    print(f"{target}: {' '.join(build(target))}")
