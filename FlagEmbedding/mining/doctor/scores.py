"""What the doctor finds with a model: cosines of positives and negatives, margins, solved rows, the penalty's pairs.

Every different text is embedded once. The vectors go to a file window by window; a run that was killed goes on with the
next window, and since windows are cut the same way, ends with the same vectors. Figures are gathered in histograms of
fixed bins, so memory does not grow with the data.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from FlagEmbedding.mining.common.jobs import progress
from FlagEmbedding.mining.doctor.arguments import ScoreSettings
from FlagEmbedding.mining.doctor.scan import PAGE, SHOWN, Row, Texts, short
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.identity import made_by
from FlagEmbedding.utils.io import write_json_atomic

if TYPE_CHECKING:
    from FlagEmbedding.inference.text_encoder import TextEncoder

_BIN = 0.005
SOLVED = 0.99


class Histogram:
    """Counts of numbers from ``low`` to ``high`` in bins of 0.005; quantiles are right to within one bin."""

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.counts = np.zeros(round((high - low) / _BIN), dtype=np.int64)
        self.total, self.below_zero = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        """Count ``values [n]``; those beyond the ends go into the outermost bins."""
        places = np.clip(((values - self.low) / _BIN).astype(np.int64), 0, len(self.counts) - 1)
        np.add.at(self.counts, places, 1)
        self.total += float(values.sum())
        self.below_zero += int((values < 0).sum())

    @property
    def count(self) -> int:
        """How many were added."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Middle of the bin in which the quantile lies."""
        place = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * self.count))))
        return self.low + (place + 0.5) * _BIN

    def figures(self) -> dict[str, float]:
        """Count, mean and quantiles."""
        if not self.count:
            return {"count": 0}
        quantiles = {name: round(self.quantile(share), 4) for name, share in QUANTILES.items()}
        return {"count": self.count, "mean": round(self.total / self.count, 6), **quantiles}

    def coarse(self, join: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """Edges and counts of bins of ``join`` · 0.005, cut down to where something is."""
        counts = self.counts.reshape(-1, join).sum(1)
        filled = np.flatnonzero(counts)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
        return self.low + np.arange(first, last + 1) * join * _BIN, counts[first:last]


QUANTILES = {"min": 0.0, "1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99, "max": 1.0}


def _cosines(low: float = -1, high: float = 1) -> Any:
    return field(default_factory=lambda: Histogram(low, high))


@dataclass
class Scores:
    """The figures.

    Attributes:
        positive, negative: cosines to the query.
        margin: the lowest positive of the row less the negative.
        penalty: 1 − cosine of a negative and its query, the term of CLP.
        above: negatives above the lowest positive of their row; ``rows_above``: rows that have one.
        solved: rows whose positive gets 99 % or more of the softmax over its own group.
        loss: over a row's own group, summed over the rows.
        suspects: the smallest margins: (margin, place, query, passage).
    """

    rows: int = 0
    positive: Histogram = _cosines()
    negative: Histogram = _cosines()
    margin: Histogram = _cosines(-2, 2)
    penalty: Histogram = _cosines(0, 2)
    above: int = 0
    rows_above: int = 0
    solved: int = 0
    loss: float = 0.0
    suspects: list[tuple[float, str, str, str]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """The figures as JSON."""
        terms = ("positive", "negative", "margin", "penalty")
        return {
            "rows": self.rows, **{name: getattr(self, name).figures() for name in terms},
            "negatives_above_positive": self.above, "rows_with_one": self.rows_above, "solved_rows": self.solved,
            "mean_loss": round(self.loss / max(1, self.rows), 6), "suspects": [list(found) for found in self.suspects],
        }  # fmt: skip


def embed(folder: Path, texts: Texts, encoder: TextEncoder, settings: ScoreSettings, inputs: Any) -> np.ndarray:
    """Unit vectors of all texts of a scan, ``[N, D]`` float32 in a file of ``folder``, in the texts' order.

    What a killed run left there is continued where it was made of the same ``inputs`` (JSON) in the same way.
    """
    path, record, row, total = folder / "vectors.f32", folder / "vectors.json", encoder.hidden_size * 4, len(texts)
    with clear_disk_errors(f"writing {path}"):
        identity = {"encoder": encoder.describe(), **asdict(settings), "inputs": inputs}
        if not made_by(record, identity):
            path.write_bytes(b"")
            write_json_atomic(record, identity)
        size = path.stat().st_size if path.exists() else 0
        done = size // row // PAGE * PAGE if size < total * row else total
        bar: tqdm[Any] = progress("embedding", total=total, done=done)
        with open(path, "ab") as stream, bar:
            stream.truncate(done * row)
            for page in texts.pages(done) if done < total else ():
                stream.write(_window(page, encoder, settings).astype("<f4").tobytes())
                stream.flush()
                bar.update(len(page))
    return np.memmap(path, dtype="<f4", mode="r").reshape(-1, encoder.hidden_size)


def _window(page: list[tuple[str, str, int]], encoder: TextEncoder, settings: ScoreSettings) -> np.ndarray:
    # Here, so that a report without a model does without torch.
    from FlagEmbedding.inference.text_encoder import encode_texts

    vectors = np.empty((len(page), encoder.hidden_size), dtype=np.float32)
    # As in training: a negative's own query is a query, read at the passages' length.
    for roles, instruction, length in (
        (("query",), settings.query_instruction_for_retrieval, settings.query_max_len),
        (("pos", "neg"), settings.passage_instruction_for_retrieval, settings.passage_max_len),
        (("neg_q",), settings.query_instruction_for_retrieval, settings.passage_max_len),
    ):
        places = [i for i, (role, _, _) in enumerate(page) if role in roles]
        vectors[places] = encode_texts(encoder, [page[i][1] for i in places], length, instruction)
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def score(texts: Texts, vectors: np.ndarray, temperature: float) -> Scores:
    """Go through the rows and gather the figures."""
    scores = Scores()
    heap: list[tuple[float, int, str, int, int]] = []
    for number, row in enumerate(progress("scoring rows", texts.rows())):
        margin = score_row(row, vectors, temperature, scores)
        worst = int(margin.argmin())
        entry = (-float(margin[worst]), -number, f"{row.place}: neg[{worst}]", row.query, row.neg[worst])
        (heapq.heappush if len(heap) < SHOWN else heapq.heappushpop)(heap, entry)
    scores.suspects = [
        (round(-m, 4), where, short(texts.text(query)), short(texts.text(negative)))
        for m, _, where, query, negative in sorted(heap, reverse=True)
    ]
    return scores


def score_row(row: Row, vectors: np.ndarray, temperature: float, scores: Scores) -> np.ndarray:
    """Count one row; returns the margin of each negative, ``[n]``."""
    query, positives, negatives = (vectors[numbers].astype(np.float64) for numbers in (row.query, row.pos, row.neg))
    positive, negative = positives @ query, negatives @ query
    margin: np.ndarray = positive.min() - negative
    scores.rows += 1
    for histogram, values in ((scores.positive, positive), (scores.negative, negative), (scores.margin, margin)):
        histogram.add(values)
    scores.above += int((margin < 0).sum())
    scores.rows_above += bool((margin < 0).any())
    # InfoNCE over the row's own group; a positive is drawn at random, so the losses of all are averaged.
    loss = np.log1p(np.exp((negative[None, :] - positive[:, None]) / temperature).sum(1))
    scores.loss += float(loss.mean())
    scores.solved += bool(np.exp(-loss.mean()) >= SOLVED)
    if row.neg_q:
        places, asked = zip(*row.neg_q, strict=True)
        cosines = np.einsum("nd,nd->n", negatives[list(places)], vectors[list(asked)].astype(np.float64))
        scores.penalty.add(1 - cosines)
    return margin
