"""How long an exact lexical search takes: passages of random words by Zipf's law, as many as asked for.

python benchmarks/sparse_search.py --passages 100000 --queries 100
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from FlagEmbedding.retrieval.lexical import Postings, best, write_postings

VOCABULARY, TOKENS, ASKED = 250_002, 80, 12  # XLM-R's pieces; those of a passage and of a query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    given = parser.parse_args()
    generator = np.random.default_rng(0)
    chances = 1 / (np.arange(1, VOCABULARY + 1) + 2.7)  # Zipf and Mandelbrot
    ends = np.cumsum(chances / chances.sum())
    with tempfile.TemporaryDirectory() as folder:
        size = given.passages * TOKENS
        ids = np.memmap(Path(folder) / "ids", "<i4", "w+", shape=(size,))
        weights = np.memmap(Path(folder) / "weights", "<f4", "w+", shape=(size,))
        for start in range(0, size, 1 << 22):  # a passage may hold a token twice: harder than the truth
            own = slice(start, min(size, start + (1 << 22)))
            ids[own] = np.searchsorted(ends, generator.random(own.stop - start))
            weights[own] = generator.random(own.stop - start, dtype=np.float32)
        started = time.perf_counter()
        files = write_postings(Path(folder), np.arange(given.passages + 1) * TOKENS, ids, weights)
        built = time.perf_counter() - started
        arrays = [np.memmap(Path(folder) / n, str(f["dtype"]), "r", shape=tuple(f["shape"])) for n, f in files.items()]
        postings = Postings([str(i) for i in range(given.passages)], *arrays)
        queries = [
            (np.unique(np.searchsorted(ends, generator.random(ASKED))), np.ones(ASKED)) for _ in range(given.queries)
        ]
        queries = [(tokens, ones[: len(tokens)]) for tokens, ones in queries]
        found = []
        for top_k in (100, 1000):
            started = time.process_time()  # of one core, whatever else runs
            for query in queries:
                best(postings.docids, postings.scores(query), top_k)
            found.append(f"top {top_k} in {time.process_time() - started:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{given.passages} passages, {size} postings: built in {built:.2f} s; {given.queries} queries: "
        f"{', '.join(found)} (CPU); peak {peak:.0f} MB"
    )


if __name__ == "__main__":
    main()
