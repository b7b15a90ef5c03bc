"""Some training rows under a model: how far each positive is above its negatives.

The same rows under the base and under what a run left say what it changed where it was trained; under the base alone,
how much there is to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.data.collator import TrainCollator
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler

ROWS = 32
_AT_A_TIME = 8  # rows


@dataclass(frozen=True)
class Sampled:
    """Vectors and margins of the sampled rows.

    Attributes:
        queries: float32 ``[N, D]``, as they are scored.
        passages: float32 ``[N, G, D]``, each row's positive first.
        margins: float64 ``[N, G − 1]``, score of the positive minus that of each negative.
    """

    queries: np.ndarray
    passages: np.ndarray
    margins: np.ndarray

    @property
    def hardest(self) -> np.ndarray:
        """``[N]``: the smallest margin of each row."""
        least: np.ndarray = self.margins.min(axis=1)
        return least


@torch.no_grad()
def sample(model: BiEncoder, sampler: TaskBatchSampler, collator: TrainCollator) -> Sampled:
    """Encode up to :data:`ROWS` rows, evenly spread, as epoch 0 draws them; ``model`` is left in its mode."""
    dataset = sampler.dataset
    rows = np.sort(np.concatenate([task.rows for task in dataset.tasks]))
    rows = rows[np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().astype(int)]
    group, device = dataset.options.train_group_size, next(model.parameters()).device
    was_training = model.training
    model.eval()
    queries: list[np.ndarray] = []
    passages: list[np.ndarray] = []
    for first in range(0, len(rows), _AT_A_TIME):
        batch: dict[str, Any] = collator([dataset[0, int(row)] for row in rows[first : first + _AT_A_TIME]])
        found = model.encode([batch["query"].to(device), batch["passage"].to(device)], [{"dense"}, {"dense"}])
        for vectors, into in zip(found, (queries, passages), strict=True):
            assert vectors.dense is not None
            into.append(vectors.dense.float().cpu().numpy())
    model.train(was_training)
    asked = np.concatenate(queries)
    given = np.concatenate(passages).reshape(len(asked), group, -1)
    scores = np.einsum("nd,ngd->ng", asked.astype(np.float64), given.astype(np.float64))
    return Sampled(asked, given, scores[:, :1] - scores[:, 1:])
