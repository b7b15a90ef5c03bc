"""``FlagReranker``: upstream's class for cross-encoders (bge-reranker-base, -large, -v2-m3) on sentence-transformers'.

Signatures and numbers are those of FlagEmbedding 1.4.2: the query is cut at ``query_max_length`` (three quarters of
``max_length`` where it is left open), then the passage until both fit; scores are logits, or with ``normalize`` their
sigmoid. Differences, on purpose: no pairs give no scores, what is no trained reranker is refused, and a model may be
used by several threads at a time, which take turns.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch

from FlagEmbedding.inference import keywords
from FlagEmbedding.inference.base import Devices, target_devices
from FlagEmbedding.inference.precision import resolve_device
from FlagEmbedding.inference.texts import PLAIN_FORMAT, Pairs, after_instruction, as_pairs, check_instruction, whole
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

_TURN = Lock()  # sentence-transformers writes into the tokenizer where it cuts


def load_cross_encoder(
    model: str, called: str, max_length: int, device: str, dtype: torch.dtype, cache_dir: str | None, trust: bool
) -> Any:
    """sentence-transformers' ``CrossEncoder`` of one label.

    Args:
        model: hub id or folder.
        called: what messages call it.
        max_length: tokens of a pair.
        trust: run code that comes with the model.

    Raises:
        UsageError: not a classifier with one label, or no ``sentence-transformers`` package.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise UsageError(f"{called} needs sentence-transformers: pip install 'FlagEmbedding[mining]'") from error
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, cache_dir=cache_dir, trust_remote_code=trust)
        kinds = config.architectures or []
        if not any("SequenceClassification" in kind for kind in kinds):
            raise UsageError(f"{called}: not a trained reranker, it lacks a classifier ({', '.join(kinds)})")
        if config.num_labels != 1:
            raise UsageError(f"{called}: a classifier of {config.num_labels} labels; expected one")
        return CrossEncoder(
            model, device=device, max_length=max_length, cache_folder=cache_dir, model_kwargs={"dtype": dtype},
            trust_remote_code=trust,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UsageError(f"{called}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


class FlagReranker:
    """Scores of (query, passage) pairs; arguments as upstream's.

    ``use_fp16`` acts on a GPU. Several ``devices`` share out the pairs, each with a process of its own.

    Raises:
        UsageError: a keyword or a model that cannot be used.
    """

    def __init__(
        self,
        model_name_or_path: str,
        use_fp16: bool = False,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = PLAIN_FORMAT,
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = PLAIN_FORMAT,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        devices: Devices = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int = 512,
        normalize: bool = False,
        **others: Any,
    ) -> None:
        keywords.refuse(others, "FlagReranker", FlagReranker.__init__)
        check_instruction(query_instruction_for_rerank, query_instruction_format, "query_instruction_for_rerank")
        check_instruction(passage_instruction_for_rerank, passage_instruction_format, "passage_instruction_for_rerank")
        self.model_name_or_path = model_name_or_path
        self.query_instruction_for_rerank = query_instruction_for_rerank
        self.query_instruction_format = query_instruction_format
        self.passage_instruction_for_rerank = passage_instruction_for_rerank
        self.passage_instruction_format = passage_instruction_format
        self.batch_size = whole("batch_size", batch_size)
        self.max_length = whole("max_length", max_length)
        self.query_max_length = None if query_max_length is None else whole("query_max_length", query_max_length)
        self.normalize = normalize
        self.target_devices = target_devices(devices)
        device = resolve_device(self.target_devices[0])
        self.use_fp16 = use_fp16 and device.type != "cpu"
        dtype = torch.float16 if self.use_fp16 else torch.float32
        self._encoder = load_cross_encoder(
            model_name_or_path, model_name_or_path, max_length, str(device), dtype, cache_dir, trust_remote_code
        )
        self.tokenizer: Any = self._encoder.tokenizer
        self.model: Any = self._encoder.model
        self.pool: Any = None
        self._longest, self._said_longest = longest_input(self.model.base_model), False

    def compute_score(
        self,
        sentence_pairs: Pairs,
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        show_progress_bar: bool = False,
        **others: Any,
    ) -> list[float]:
        """The score of each pair, in order; a list of one for a single pair, as upstream's."""
        keywords.refuse(others, "compute_score", self.compute_score)
        pairs, _ = as_pairs(sentence_pairs)
        size = self.batch_size if batch_size is None else whole("batch_size", batch_size)
        of_query, of_both = self._lengths(query_max_length, max_length)
        if not pairs:
            return []
        queries, passages = (list(side) for side in zip(*pairs, strict=True))
        queries = after_instruction(queries, self.query_instruction_for_rerank, self.query_instruction_format)
        passages = after_instruction(passages, self.passage_instruction_for_rerank, self.passage_instruction_format)
        with _TURN:
            if self.pool is None and len(self.target_devices) > 1:
                self.pool = self._encoder.start_multi_process_pool(self.target_devices)
            found = self._encoder.predict(
                list(zip(self._cut(queries, of_query), passages, strict=True)), prompt="", batch_size=size,
                activation_fn=torch.nn.Identity(), show_progress_bar=show_progress_bar, pool=self.pool,
                processing_kwargs={"text": {"truncation": "only_second", "max_length": of_both}},
            )  # fmt: skip
        logits = torch.from_numpy(found).double()
        wanted = self.normalize if normalize is None else normalize
        return [float(score) for score in (logits.sigmoid() if wanted else logits)]

    def _lengths(self, query_max_length: int | None, max_length: int | None) -> tuple[int, int]:
        """Tokens of a query and of a pair. Raises ``UsageError`` where no passage would fit beside the query."""
        both = self.max_length if max_length is None else whole("max_length", max_length)
        if self._longest is not None and both > self._longest:
            if not self._said_longest:
                self._said_longest = True
                logger.warning(
                    "%s reads at most %d tokens: cutting there, not at %d", self.model_name_or_path, self._longest, both
                )
            both = self._longest
        given = self.query_max_length if query_max_length is None else whole("query_max_length", query_max_length)
        query = both * 3 // 4 if given is None else given
        if query < 1 or query + self.tokenizer.num_special_tokens_to_add(pair=True) >= both:
            raise UsageError(
                f"a query of up to {query} tokens leaves no room for a passage in a max_length of {both}; give a "
                "smaller query_max_length or a larger max_length"
            )
        return query, both

    def _cut(self, queries: list[str], length: int) -> list[str]:
        """Queries of more than ``length`` tokens are cut and written out again, as upstream does."""
        found = self.tokenizer(queries, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [
            self.tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False) if len(ids) > length else query
            for query, ids in zip(queries, found, strict=True)
        ]

    def stop_self_pool(self) -> None:
        """Stop the processes of several devices and let go of cached memory; the model can still be used."""
        if self.pool is not None:
            self._encoder.stop_multi_process_pool(self.pool)
            self.pool = None
        torch.cuda.empty_cache()

    def __enter__(self) -> FlagReranker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_self_pool()
