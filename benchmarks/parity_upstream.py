"""Do FlagModel and BGEM3FlagModel give what upstream's do? The same calls in two Pythons, compared.

    python benchmarks/parity_upstream.py --peer-python PEERS/bin/python --model CHECKPOINT --texts docs-0.jsonl.gz

The peer's Python holds FlagEmbedding 1.4.2 (pip install FlagEmbedding==1.4.2). A checkpoint without sparse and colbert
heads gets seeded random ones in a temporary copy. Exit code 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def worker(model_dir: str, texts_file: str, out: str) -> None:
    """Call the public classes of whichever FlagEmbedding this Python has; write what comes back."""
    import numpy as np

    from FlagEmbedding import BGEM3FlagModel, FlagModel

    texts = json.loads(Path(texts_file).read_text("utf-8"))
    queries, passages = texts["queries"], texts["passages"]
    arrays, other = {}, {}
    for pooling in ("cls", "mean"):
        model = FlagModel(model_dir, pooling_method=pooling, use_fp16=False, devices="cpu")
        arrays[f"dense_{pooling}"] = model.encode_corpus(passages, batch_size=16, max_length=256)
        arrays[f"dense_{pooling}_queries"] = model.encode_queries(queries, batch_size=16, max_length=64)
    m3 = BGEM3FlagModel(model_dir, use_fp16=False, devices="cpu")
    found = m3.encode(
        passages, batch_size=16, max_length=256, return_dense=True, return_sparse=True, return_colbert_vecs=True
    )
    arrays["m3_dense"] = found["dense_vecs"]
    other["lexical"] = [{k: float(v) for k, v in row.items()} for row in found["lexical_weights"]]
    arrays["colbert"] = np.concatenate(found["colbert_vecs"])
    other["colbert_lengths"] = [len(rows) for rows in found["colbert_vecs"]]
    # The documented example: the score of two arrays of vectors, and of two dictionaries of weights.
    colbert = found["colbert_vecs"]
    other["colbert_pairs"] = [float(m3.colbert_score(a, b)) for a, b in pairwise(colbert)]
    lexical = found["lexical_weights"]
    other["lexical_pairs"] = [float(m3.compute_lexical_matching_score(a, b)) for a, b in pairwise(lexical)]
    pairs = list(zip(queries, passages, strict=True))
    for name, weights in (("scores", None), ("scores_weighted", [0.4, 0.2, 0.4])):
        other[name] = m3.compute_score(
            pairs,
            batch_size=8,
            max_query_length=64,
            max_passage_length=256,
            weights_for_different_modes=weights,
        )
    np.savez(f"{out}.npz", **arrays)
    Path(f"{out}.json").write_text(json.dumps(other))


def with_heads(model: Path, scratch: Path) -> Path:
    """The checkpoint itself when it has heads, else links to its files and seeded random heads beside them."""
    if (model / "sparse_linear.pt").exists():
        return model
    import torch

    folder = scratch / model.name
    folder.mkdir()
    for path in model.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    for name, columns in (("colbert", width), ("sparse", 1)):
        torch.save(torch.nn.Linear(width, columns).state_dict(), folder / f"{name}_linear.pt")
    return folder


def read_texts(path: Path, count: int) -> dict[str, list[str]]:
    """Passages from a corpus file; queries are the first words of passages further down."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        rows = [json.loads(line)["text"] for line in lines][:count]
    queries = [" ".join(rows[(i * 7 + i % 2) % len(rows)].split()[:9]) for i in range(len(rows))]
    return {"passages": rows, "queries": queries}


def run(python: str, model: Path, texts: Path, out: Path, own: bool) -> tuple[Any, Any]:
    """Start the worker in ``python``; only our own run sees this checkout."""
    import numpy as np

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if own:
        environment["PYTHONPATH"] = str(REPOSITORY)
    words = [python, __file__, "--worker", str(model), str(texts), str(out)]
    subprocess.run(words, check=True, cwd=texts.parent, env=environment)
    return np.load(f"{out}.npz"), json.loads(Path(f"{out}.json").read_text())


def compare(mine: tuple[Any, Any], theirs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """One row a quantity: how many were compared, the worst, the bound."""
    import numpy as np

    rows: list[dict[str, Any]] = []

    def add(name: str, count: int, what: str, worst: float, bound: float, good: bool) -> None:
        rows.append({"quantity": name, "n": count, "what": what, "worst": worst, "bound": bound, "ok": bool(good)})

    for name in mine[0].files:
        a, b = mine[0][name].astype(np.float64), theirs[0][name].astype(np.float64)
        if a.shape != b.shape:
            add(name, len(a), f"shape {a.shape} and {b.shape}", float("nan"), 0.0, False)
            continue
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        add(name, len(a), "least cosine", float(cosine.min()), 0.99999, cosine.min() >= 0.99999)
    same = [x.keys() == y.keys() for x, y in zip(mine[1]["lexical"], theirs[1]["lexical"], strict=True)]
    add("lexical weights", len(same), "rows with other tokens", float(same.count(False)), 0.0, all(same))
    off = [
        abs(x.get(token, 0.0) - y[token])
        for x, y in zip(mine[1]["lexical"], theirs[1]["lexical"], strict=True)
        for token in y
    ]
    add("lexical weights", len(off), "greatest difference", max(off), 1e-5, max(off) <= 1e-5)
    lists = {"colbert_score": "colbert_pairs", "compute_lexical_matching_score": "lexical_pairs"}
    columns = {name: (mine[1][key], theirs[1][key]) for name, key in lists.items()}
    for name in ("scores", "scores_weighted"):
        for kind in theirs[1][name]:
            columns[f"compute_score {kind}{' weighted' if 'w' in name else ''}"] = (
                mine[1][name][kind],
                theirs[1][name][kind],
            )
    for name, (x, y) in columns.items():
        worst = float(np.abs(np.array(x) - np.array(y)).max())
        add(name, len(x), "greatest difference", worst, 1e-4, worst <= 1e-4)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| quantity | n | measured | worst | bound | |", "|---|---|---|---|---|---|"]
    for row in rows:
        worst = f"{row['worst']:.8f}" if row["what"] == "least cosine" else f"{row['worst']:.2g}"
        bound = f"≥ {row['bound']}" if row["what"] == "least cosine" else f"≤ {row['bound']:g}"
        verdict = "ok" if row["ok"] else "MISSED"
        lines.append(f"| {row['quantity']} | {row['n']} | {row['what']} | {worst} | {bound} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="a Python that holds upstream's FlagEmbedding")
    parser.add_argument("--model", type=Path, required=True, help="a dense checkpoint")
    parser.add_argument("--texts", type=Path, required=True, help=".jsonl or .jsonl.gz with a 'text' a line")
    parser.add_argument("--count", type=int, default=48, help="how many texts")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = with_heads(arguments.model.resolve(), scratch)
        texts = scratch / "texts.json"
        texts.write_text(json.dumps(read_texts(arguments.texts, arguments.count)), encoding="utf-8")
        mine = run(sys.executable, model, texts, scratch / "mine", own=True)
        theirs = run(arguments.peer_python, model, texts, scratch / "theirs", own=False)
        rows = compare(mine, theirs)
    print(table(rows))
    if arguments.output:
        sys.path.insert(0, str(REPOSITORY))
        from FlagEmbedding.utils.provenance import provenance

        arguments.output.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5])
    else:
        sys.exit(main())
