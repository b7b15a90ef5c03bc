"""What a form of a checkpoint is worth: size on disk, cosine to the checkpoint's vectors, nDCG@10, time of a query."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.evaluation.on_dev import NDCG, against_first, overall, score_on_dev
from FlagEmbedding.evaluation.systems import System
from FlagEmbedding.evaluation.tables import p_text, signed_points
from FlagEmbedding.export.samples import Samples
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.modeling.files import weight_files
from FlagEmbedding.utils.adapter_folder import files_of
from FlagEmbedding.utils.pages import table

_QUERIES, _ROUNDS = 20, 3


@dataclass(frozen=True)
class Kind:
    """One form of the checkpoint, measured.

    Attributes:
        size: bytes of its weights on disk.
        cosines: to the checkpoint's vectors, one for each sample text.
        milliseconds: processor time of a single query, tokenization included, on one thread; median.
        system: its scores on the dev collection, where one was given.
    """

    name: str
    size: int
    cosines: np.ndarray
    milliseconds: float
    system: System | None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "bytes": self.size,
            "cosine_mean": float(self.cosines.mean()),
            "cosine_min": float(self.cosines.min()),
            "query_milliseconds": self.milliseconds,
            "ndcg@10": None if self.system is None else overall(self.system),
        }


def weight_size(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(files_of(folder)))


def measure(
    name: str, encoder: TextEncoder, size: int, samples: Samples, reference: np.ndarray, dev: DevArguments
) -> Kind:
    """Measure ``encoder`` against the ``reference`` vectors ``[N, D]`` that the checkpoint gives of ``samples``."""
    cosines = (samples.vectors(encoder, dev) * reference).sum(axis=1)
    system = score_on_dev(name, encoder, dev) if dev.eval_data_dir else None
    return Kind(name, size, cosines, query_milliseconds(encoder, samples.queries), system)


def query_milliseconds(encoder: TextEncoder, queries: Sequence[str]) -> float:
    """Median processor time to encode one query, after each was encoded once; others' work does not count."""
    chosen, times = list(queries[:_QUERIES]), []
    length = min(512, encoder.longest or 512)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(1 + _ROUNDS):
            for query in chosen:
                started = time.process_time()
                list(encoder.encode([([query], None)], length))
                times += [time.process_time() - started] if turn else []
    finally:
        torch.set_num_threads(before)
    return 1000 * float(np.median(times))


def page(kinds: Sequence[Kind]) -> str:
    """All kinds as a table; scores × 100, their differences from the first kind."""
    headers = ["kind", "MB", "cosine (mean)", "cosine (least)", "ms per query"]
    rows = [
        [
            kind.name, f"{kind.size / 1e6:.1f}", f"{kind.cosines.mean():.5f}", f"{kind.cosines.min():.5f}",
            f"{kind.milliseconds:.1f}",
        ]
        for kind in kinds
    ]  # fmt: skip
    systems = [kind.system for kind in kinds if kind.system is not None]
    if systems:
        headers += [NDCG.label, "difference", "95 % interval", "p"]
        for row, system, test in zip(rows, systems, [None, *against_first(systems)], strict=True):
            row += [f"{100 * overall(system):.2f}"]
            row += ["", "", ""] if test is None else [
                signed_points(test.difference), f"{signed_points(test.low)} to {signed_points(test.high)}",
                p_text(test.p_value),
            ]  # fmt: skip
    return table(headers, rows, range(1, len(headers)))
