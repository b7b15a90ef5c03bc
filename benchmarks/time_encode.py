"""Time one engine's public ``encode`` over a file of texts; prints one line of JSON.

    python benchmarks/time_encode.py --engine flagembedding|sentence-transformers|… --model M --texts T.jsonl

Run by ``compare.py`` in the project's Python and in the peers'. ``flagembedding`` is ``BGEM3FlagModel`` of whichever
distribution that Python holds: this project's or upstream's. Runtimes of exported models (``exports.py``) get texts
sorted by length, in padded batches, as sentence-transformers makes them. The clock runs over the call, list of strings
in, array out; loading and a warm-up call stand outside. With one thread, processor seconds are the figure to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("fp32", "bf16", "fp16")


def flagembedding(arguments: argparse.Namespace) -> tuple[Callable[[list[str]], Any], Any]:
    """``BGEM3FlagModel.encode``, dense vectors, or all three with ``--all-heads``."""
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(
        str(arguments.model),
        use_fp16=arguments.dtype == "fp16",
        use_bf16=arguments.dtype == "bf16",
        devices=[arguments.device],
    )

    def encode(texts: list[str]) -> Any:
        found = model.encode(
            texts,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            return_dense=True,
            return_sparse=arguments.all_heads,
            return_colbert_vecs=arguments.all_heads,
        )
        return found["dense_vecs"]

    return encode, model.tokenizer


def sentence_transformers(arguments: argparse.Namespace) -> tuple[Callable[[list[str]], Any], Any]:
    """``SentenceTransformer.encode``."""
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    model = SentenceTransformer(str(arguments.model), device=arguments.device, model_kwargs={"dtype": dtype})
    model.max_seq_length = arguments.max_length

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, batch_size=arguments.batch_size, show_progress_bar=False)

    return encode, model.tokenizer


def runtime(arguments: argparse.Namespace) -> tuple[Callable[[list[str]], Any], Any]:
    """A runtime of ``exports.py`` over padded batches of texts sorted by length; unit vectors of first tokens."""
    import numpy as np
    from exports import load
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.model))
    folder = arguments.exports or arguments.model.with_name(f"{arguments.model.name}-exports")
    run = load(arguments.engine, arguments.model, folder, arguments.threads)

    def encode(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        vectors: Any = [None] * len(texts)
        for start in range(0, len(order), arguments.batch_size):
            piece = order[start : start + arguments.batch_size]
            rows = tokenizer(
                [texts[number] for number in piece],
                padding=True,
                truncation=True,
                max_length=arguments.max_length,
                return_tensors="np",
            )
            states = run(rows["input_ids"].astype(np.int64), rows["attention_mask"].astype(np.int64))
            for number, state in zip(piece, states, strict=True):
                vectors[number] = state / np.linalg.norm(state)
        return np.stack(vectors)

    return encode, tokenizer


RUNTIMES = ("transformers", "onnxruntime", "onnxruntime-int8", "openvino")
ENGINES = {
    "flagembedding": flagembedding,
    "sentence-transformers": sentence_transformers,
    **dict.fromkeys(RUNTIMES, runtime),
}


def read(path: Path, limit: int) -> list[str]:
    """The ``text`` of each line."""
    rows = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    return rows[:limit] if limit else rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, tokens and peak memory of one call, and how near the matrix products it came."""
    import torch
    from floor import compare_with_floor

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    texts = read(arguments.texts, arguments.limit)
    encode, tokenizer = ENGINES[arguments.engine](arguments)
    ids = tokenizer(texts, truncation=True, max_length=arguments.max_length)["input_ids"]
    tokens = sum(map(len, ids))
    encode(texts[: arguments.batch_size])

    def now() -> tuple[float, float]:
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    start = now()
    vectors = encode(texts)
    end = now()
    wall, busy = end[0] - start[0], end[1] - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    record = {
        "engine": arguments.engine,
        "dtype": arguments.dtype,
        "texts": len(texts),
        "tokens": tokens,
        "dimension": int(vectors.shape[1]),
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(busy, 3),
        "tokens_per_second": round(tokens / wall, 1),
        "peak_rss_mb": round(peak),
    }
    if arguments.device != "cpu":
        record["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    floor = compare_with_floor(arguments.model, tokens, dtype, arguments.device, False, wall, busy)
    return {**record, **floor}


def parser() -> argparse.ArgumentParser:
    """The options of one measurement."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", required=True, choices=tuple(ENGINES))
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--texts", type=Path, required=True)
    options.add_argument("--limit", type=int, default=0, help="first so many texts; 0: all")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    options.add_argument("--all-heads", action="store_true", help="flagembedding: sparse and colbert too")
    options.add_argument("--exports", type=Path, help="folder for exported models; default: beside the model")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1, help="torch threads; 0: all cores")
    return options


def main() -> int:
    arguments = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # What libraries print belongs to stderr: stdout carries one line.
    answer, sys.stdout = sys.stdout, sys.stderr
    record = measure(arguments)
    print(json.dumps(record), file=answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
