"""A reranker that scores (query, passage) pairs: sentence-transformers' ``CrossEncoder`` of one label.

The score is the sigmoid of the logit, so limits lie in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.mining.hard_negatives.arguments import RerankerArguments
from FlagEmbedding.utils.errors import UsageError
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
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise UsageError(
                "--cross_encoder needs sentence-transformers: pip install 'FlagEmbedding[mining]'"
            ) from error
        from transformers import AutoConfig

        assert options.cross_encoder is not None
        self.options, name = options, f"--cross_encoder {options.cross_encoder}"
        trust = {"trust_remote_code": hub.trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(options.cross_encoder, cache_dir=hub.cache_dir, **trust)
            kinds = config.architectures or []
            if not any("SequenceClassification" in kind for kind in kinds):
                raise UsageError(f"{name}: not a trained reranker, it lacks a classifier ({', '.join(kinds)})")
            if config.num_labels != 1:
                raise UsageError(f"{name}: a classifier of {config.num_labels} labels; expected one")
            self.model: Any = CrossEncoder(
                options.cross_encoder, device=str(choose_device()), max_length=options.cross_encoder_max_length,
                cache_folder=hub.cache_dir, model_kwargs={"dtype": torch.float32}, **trust,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UsageError(f"{name}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error

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
