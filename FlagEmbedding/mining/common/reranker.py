"""A reranker that scores (query, passage) pairs: sentence-transformers' ``CrossEncoder`` of one label.

The score is the sigmoid of the logit, so limits lie in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.reranker import load_cross_encoder
from FlagEmbedding.mining.common.options import RerankerArguments
from FlagEmbedding.utils.hardware import choose_device


class Reranker:
    """A loaded reranker.

    Args:
        options: which, and how pairs are cut and batched.
        hub: ``cache_dir`` and ``trust_remote_code`` are read.

    Raises:
        UsageError: not a classifier with one label, or no ``sentence-transformers`` package.
    """

    def __init__(self, options: RerankerArguments, hub: EncoderArguments) -> None:
        assert options.cross_encoder is not None
        self.options = options
        self.model = load_cross_encoder(
            options.cross_encoder, f"--cross_encoder {options.cross_encoder}", options.cross_encoder_max_length,
            str(choose_device()), torch.float32, hub.cache_dir, hub.trust_remote_code,
        )  # fmt: skip

    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """The score of each passage for ``query``, in 0 to 1, 6 decimals."""
        if not passages:
            return []
        scores = self.model.predict(
            [(query, passage) for passage in passages], batch_size=self.options.cross_encoder_batch_size,
            activation_fn=torch.nn.Sigmoid(), show_progress_bar=False,
            processing_kwargs={"text": {"truncation": "only_second"}},  # the passage is cut, the query stays
        )  # fmt: skip
        return [round(score, 6) for score in scores.tolist()]
