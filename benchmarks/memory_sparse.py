"""Peak memory of the sparse loss: vocabulary-wide rows as published, and the query's own tokens alone as here.

    python benchmarks/memory_sparse.py [--rows 32] [--tokens 256]

Both compute the similarities of ``rows`` passages of ``tokens`` tokens with ``rows / 4`` queries, and their gradient,
each in a process of its own; what is reported is by how much that raised the process's peak, which importing the
libraries has set. The published way writes every token's weight into its own row of XLM-R's vocabulary
(rows × tokens × 250,002 numbers; 8.2 GB for the defaults) and takes the maximum over tokens. Values and gradients of
the two are compared first, on a vocabulary small enough for that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARY = 250_002
SKIPPED = [0, 1, 2, 3]


def batch(rows: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and weights of queries ``[rows / 4, 32]`` and passages ``[rows, tokens]``."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((max(1, rows // 4), 32), (rows, tokens))
    ids = [torch.randint(4, vocabulary, size, generator=generator) for size in sizes]
    ids[1][:, :16] = ids[0][0, :16]  # some tokens in common
    weights = [torch.rand(size, generator=generator) for size in sizes]
    return ids[0], weights[0].requires_grad_(), ids[1], weights[1].requires_grad_()


def published(ids: Tensor, weights: Tensor, vocabulary: int) -> Tensor:
    """``[N, V]``: each row's greatest weight for each token, by way of ``[N, L, V]``."""
    wide = torch.zeros(*ids.shape, vocabulary).scatter(-1, ids[..., None], weights[..., None]).max(dim=1).values
    wide = wide.clone()
    wide[:, SKIPPED] = 0
    return wide


def similarities(way: str, parts: tuple[Tensor, Tensor, Tensor, Tensor], vocabulary: int) -> Tensor:
    """``[B, M]`` lexical similarities."""
    q_ids, q_weights, p_ids, p_weights = parts
    if way == "published":
        return published(q_ids, q_weights, vocabulary) @ published(p_ids, p_weights, vocabulary).T
    sys.path.insert(0, str(REPOSITORY))
    from FlagEmbedding.losses.contrastive import sparse_scores

    lengths = [[ids.shape[1]] * ids.shape[0] for ids in (q_ids, p_ids)]
    flat = [q_ids.flatten(), q_weights.flatten(), lengths[0], p_ids.flatten(), p_weights.flatten(), lengths[1]]
    return sparse_scores(*flat, SKIPPED, 1.0)  # type: ignore[arg-type]


def compare() -> float:
    """Greatest difference of values and gradients on a vocabulary of 1,000."""
    found = []
    for way in ("published", "this"):
        parts = batch(8, 64, 1000)
        scores = similarities(way, parts, 1000)
        scores.square().sum().backward()
        found.append([scores.detach(), parts[1].grad, parts[3].grad])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--way", choices=("published", "this"), help="run one of them in this process")
    arguments = parser.parse_args()
    if arguments.way:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        similarities(arguments.way, batch(arguments.rows, arguments.tokens, VOCABULARY), VOCABULARY).sum().backward()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps({"way": arguments.way, "mb": round(peak), "seconds": round(time.perf_counter() - start, 2)}))
        return 0
    print(f"greatest difference of values and gradients: {compare():.1e}")
    for way in ("this", "published"):
        words = [sys.executable, __file__, "--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
        subprocess.run([*words, "--way", way], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
