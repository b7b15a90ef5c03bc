"""Passages of a batch with the text of another query's positive: as numbers for the mask, or said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import get_worker_info

from FlagEmbedding.finetune.data.dataset import PlainTexts, TrainExample
from FlagEmbedding.losses.false_negatives import TextKeys
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.texts import text_key

logger = get_logger(__name__)


def text_keys_of(texts: Sequence[PlainTexts]) -> TextKeys:
    """The texts of a batch by ``utils.texts``' rule of what counts as the same: case, width and the unseen do not."""
    return TextKeys(
        _numbers(text.query for text in texts),
        _numbers(passage for text in texts for passage in text.passages),
        _numbers(positive for text in texts for positive in text.positives),
        torch.tensor([row for row, text in enumerate(texts) for _ in text.positives], dtype=torch.int64),
    )


def _numbers(texts: Iterable[str]) -> torch.Tensor:
    # Half of a key's 16 bytes: of a million texts two differ with equal numbers once in ten million runs.
    keys = [int.from_bytes(text_key(text)[:8], "little", signed=True) for text in texts]
    return torch.tensor(keys, dtype=torch.int64)


def say_twins(texts: Sequence[PlainTexts], examples: Sequence[TrainExample]) -> bool:
    """Say of the first batch where a negative has the very text of a positive; True once that was said."""
    counts = Counter(passage for text in texts for passage in text.passages)
    # A query's own positive stands in the batch too.
    twins = [sum(counts[positive] for positive in {*text.positives}) - 1 for text in texts]
    if not any(twins):
        return False
    worker = get_worker_info()
    if is_main() and (worker is None or worker.id == 0):
        row = examples[next(i for i, count in enumerate(twins) if count)].row
        logger.warning(
            "%s: its positive stands in the batch again, as a negative of the same query (%d such passages in this "
            "batch; as published): --mask_twins True leaves them out",
            row, sum(twins),
        )  # fmt: skip
    return True
