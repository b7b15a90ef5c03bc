"""A cross-encoder that scores (query, passage) pairs: any transformers sequence classifier with one label.

The score is the sigmoid of the logit, as sentence-transformers' ``CrossEncoder`` gives it, so limits lie in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from FlagEmbedding.inference.precision import resolve_dtype
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import choose_device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what a checkpoint lacks: that is said here, in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class CrossEncoder:
    """A loaded reranker.

    Args:
        model_name_or_path: hub id or folder.
        max_length: tokens of a pair; the passage is cut first.
        batch_size: pairs at a time.
        dtype: 'fp32', 'bf16', 'fp16' or 'auto'.

    Raises:
        UsageError: not a classifier with one label, or a checkpoint without a trained head.
    """

    def __init__(
        self,
        model_name_or_path: str,
        max_length: int = 512,
        batch_size: int = 32,
        dtype: str = "fp32",
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = choose_device()
        options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **options)
            with _quiet():
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    model_name_or_path, dtype=resolve_dtype(dtype, device), output_loading_info=True, **options
                )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"--cross_encoder {model_name_or_path}: cannot be loaded: {reason}") from error
        if loading["missing_keys"]:
            raise UsageError(
                f"--cross_encoder {model_name_or_path}: not a trained reranker, it lacks {min(loading['missing_keys'])}"
            )
        if model.config.num_labels != 1:
            raise UsageError(
                f"--cross_encoder {model_name_or_path}: a classifier of {model.config.num_labels} labels; expected one"
            )
        self.model = model.to(device).eval()
        self.max_length, self.batch_size = max_length, batch_size

    @torch.inference_mode()
    def score(self, query: str, passages: Sequence[str]) -> list[float]:
        """The score of each passage for ``query``, in 0 to 1, 6 decimals."""
        scores = [0.0] * len(passages)
        # Longest first: batches of like length, and a size that does not fit shows at once.
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            features = self.tokenizer(
                [query] * len(batch), [passages[i] for i in batch], padding=True, truncation="only_second",
                max_length=self.max_length, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            logits = self.model(**features).logits[:, 0].float()
            for place, score in zip(batch, torch.sigmoid(logits).tolist(), strict=True):
                scores[place] = round(score, 6)
        return scores
