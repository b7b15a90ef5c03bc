"""A small collection with judgments in two languages and splits, for commands that measure on dev queries."""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.conftest import make_passages, write_collection


def write_judged(root: Path) -> Path:
    """ko (30 passages) and fa (20): queries are the first words of passages, dev and train judge different ones."""
    for seed, (lang, count) in enumerate((("ko", 30), ("fa", 20))):
        passages = make_passages(count, seed)
        texts = {f"{i}-0": " ".join(row["text"].split()[:2]) + f" {i}" for i, row in enumerate(passages)}
        dev, train = (dict(list(texts.items())[start::2]) for start in (0, 1))
        write_collection(root, lang, passages, dev)
        folder = root / f"miracl-v1.0-{lang}"
        (folder / "qrels").mkdir()
        lines = "".join(f"{qid}\t{text}\n" for qid, text in train.items())
        (folder / f"topics/topics.miracl-v1.0-{lang}-train.tsv").write_text(lines, encoding="utf-8")
        for split, queries in (("dev", dev), ("train", train)):
            judged = "".join(f"{qid} Q0 {passages[int(qid.split('-')[0])]['docid']} 1\n" for qid in queries)
            (folder / f"qrels/qrels.miracl-v1.0-{lang}-{split}.tsv").write_text(judged, encoding="utf-8")
    return root
