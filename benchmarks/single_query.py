"""One query at a time, as a search server asks: this project against other runtimes, text in, unit vector out.

    python benchmarks/single_query.py --model FIXTURE/dense --exports EXPORTS

All engines run in this one process, on the same short texts, one thread each, by turns: every turn times each engine
for some calls in a row, so that a busy machine slows all of them. Prints the median and the least time per call, the
median of the turns' ratios to this project, and the cosine to transformers' own vector. Needs the libraries that
``exports.py`` names; engines that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TEXT = "어느 도시가 이 나라의 수도이고 언제 세워졌나요"


def cut(tokenizer: object, tokens: int) -> str:
    """A text of so many tokens, special ones included."""
    words = (TEXT + " ") * 40
    for end in range(1, len(words)):
        if len(tokenizer(words[:end].strip())["input_ids"]) >= tokens:  # type: ignore[operator]
            return words[:end].strip()
    raise SystemExit(f"no text of {tokens} tokens")


def engines(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[str], np.ndarray]], str]:
    """Text to unit vector, by each engine; and the text."""
    import exports

    from FlagEmbedding import FlagModel

    model = FlagModel(str(arguments.model), pooling_method="cls", devices=["cpu"])
    tokenizer = model.tokenizer
    found: dict[str, Callable[[str], np.ndarray]] = {"this": lambda text: np.asarray(model.encode(text))}
    for name in arguments.engines or [each for each in exports.ENGINES if exports.installed(each)]:
        run = exports.load(name, arguments.model, arguments.exports, arguments.threads)

        def encode(text: str, run: exports.Run = run) -> np.ndarray:
            rows = tokenizer([text], truncation=True, max_length=512, return_tensors="np")
            states = run(rows["input_ids"].astype(np.int64), rows["attention_mask"].astype(np.int64))[0]
            return states / np.linalg.norm(states)

        found[name] = encode
    return found, cut(tokenizer, arguments.tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exports", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--engines", nargs="*", help="other engines; default: all that are installed")
    parser.add_argument("--tokens", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--calls", type=int, default=10, help="calls of each engine in a turn")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(arguments.threads)
    found, text = engines(arguments)
    vectors = {name: encode(text) for name, encode in found.items()}
    right = vectors.get("transformers", vectors["this"])
    times: dict[str, list[float]] = {name: [] for name in found}
    least = dict.fromkeys(found, float("inf"))
    for _ in range(arguments.turns):
        for name, encode in found.items():
            own = []
            for _ in range(arguments.calls):
                start = time.perf_counter()
                encode(text)
                own.append(time.perf_counter() - start)
            times[name].append(statistics.median(own))
            least[name] = min(least[name], *own)
    for name, own in times.items():
        record = {
            "engine": name,
            "median_ms": round(statistics.median(own) * 1e3, 2),
            "least_ms": round(least[name] * 1e3, 2),
            "over_this": round(statistics.median(a / b for a, b in zip(own, times["this"], strict=True)), 2),
            "cosine": round(float(vectors[name] @ right), 6),
            "tokens": arguments.tokens,
            "threads": arguments.threads,
            "processor": platform.processor() or platform.machine(),
        }
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
