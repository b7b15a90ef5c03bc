"""One loaded checkpoint that turns texts into vectors: the only place where inference meets the model.

Texts come in windows. A window is tokenized ahead (``tokenization.py``), its sequences are sorted by length and cut
into slabs, and come back in the order they went in. What a slab holds depends on the window alone, and on a CPU each
slab is computed by one thread (``modeling/slabs.py``), so the same windows give the same bytes, whoever encodes them,
on however many cores, and whenever.

The token budget of a slab is ``batch_size x max_length``, the most a published batch could reach, held below what
suits the machine: 2,048 tokens stay in a CPU's cache, and a GPU wants many more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from FlagEmbedding.inference.arguments import WINDOW, EncoderArguments
from FlagEmbedding.inference.precision import dtype_name, half_precision, resolve_device, resolve_dtype
from FlagEmbedding.inference.texts import after_instruction, as_texts
from FlagEmbedding.inference.tokenization import TokenizerPool, TokenRows, tokenize
from FlagEmbedding.modeling.backbone import load_backbone, stored_experts
from FlagEmbedding.modeling.encoder import M3Encoder, Representations
from FlagEmbedding.modeling.files import load_config
from FlagEmbedding.modeling.heads import load_heads
from FlagEmbedding.modeling.interchange import choose, read_modules
from FlagEmbedding.modeling.options import SLAB_TOKENS, EngineConfig
from FlagEmbedding.modeling.packed import prepack_weights
from FlagEmbedding.modeling.pooling import check_method
from FlagEmbedding.modeling.positions import longest_input
from FlagEmbedding.modeling.projections import load_projections
from FlagEmbedding.modeling.tokenizer import load_tokenizer
from FlagEmbedding.modeling.tokens import TokenBatch, special_ids
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import tokenizer_workers, tokens_that_fit
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import model_fingerprint
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
Kind = Literal["dense", "sparse", "colbert"]
DENSE: tuple[Kind, ...] = ("dense",)
GPU_SLAB_TOKENS = 131_072


class TextEncoder:
    """A checkpoint in evaluation mode on one device, with its tokenizer.

    Raises ``UsageError`` where the options contradict the checkpoint (``moe``, ``heads``, ``pooling``).
    """

    _said_longest = False

    def __init__(self, options: EncoderArguments) -> None:
        self.options = options
        self.name = options.encoder
        self.folder = str(resolve_folder(self.name, cache_dir=options.cache_dir))
        self.device = resolve_device(options.device)
        half = half_precision(self.device) if options.fp16 else "fp32"
        self.dtype = resolve_dtype(options.dtype or half, self.device)
        self.stored = read_modules(self.folder)
        asked = None if options.pooling_method is None else check_method(options.pooling_method)
        self.pooling = choose("pooling_method", asked, self.stored.pooling, self.name) or "cls"
        self.encoder = self._load().to(device=self.device, dtype=self.dtype).eval()
        if self.device.type == "cpu" and self.encoder.engine.engine == "packed":
            prepack_weights(self.encoder.model, SLAB_TOKENS)
        self.tokenizer = load_tokenizer(
            self.folder, self.encoder.model, trust_remote_code=self.options.trust_remote_code
        )
        self.hidden_size = self._dimension(self.encoder.dimension)
        self.longest = longest_input(self.encoder.model)
        workers = tokenizer_workers(self.device.type) if options.workers is None else options.workers
        self.pool = TokenizerPool(self.tokenizer, self.folder, workers, options.trust_remote_code)

    def _dimension(self, whole: int) -> int:
        """Of the vectors that come out."""
        asked = self.options.truncate_dim
        if asked is not None and asked > whole:
            raise UsageError(f"--truncate_dim {asked}: the vectors of {self.name} have {whole} dimensions")
        return whole if asked is None else asked

    def _load(self) -> M3Encoder:
        self._check_moe()
        backbone = load_backbone(self.folder, dtype=self.dtype)
        colbert = sparse = None
        if self.options.heads:
            colbert, sparse, found = load_heads(self.folder, backbone.config.hidden_size, self.options.colbert_dim)
            if not found:
                colbert = sparse = None
        return M3Encoder(
            backbone,
            colbert_linear=colbert,
            sparse_linear=sparse,
            pooling=self.pooling,
            normalize=False,  # done in float32 by _finish, whatever the model computes in
            engine=EngineConfig(engine=self.options.engine),
            projections=load_projections(self.stored.dense, backbone.config.hidden_size),
        )

    def _check_moe(self) -> None:
        """The checkpoint's config decides where experts are; ``--moe`` merely has to agree."""
        stored = stored_experts(load_config(self.folder), self.folder)
        there = stored.moe if stored else None
        if self.options.moe is not None and self.options.moe != there:
            is_what = f"a mixture of experts in '{there}'" if there else "a dense model"
            raise UsageError(
                f"--moe {self.options.moe}: {self.name} is {is_what}, as its config.json says; leave --moe out"
            )

    @property
    def has_heads(self) -> bool:
        """True when the checkpoint came with sparse and colbert heads and they were asked for."""
        return self.encoder.sparse_linear is not None and self.encoder.colbert_linear is not None

    @property
    def special_ids(self) -> list[int]:
        """Tokens that lexical scores leave out."""
        return special_ids(self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """What decides the vectors, for a manifest."""
        return {
            "model": model_fingerprint(self.folder),
            "pooling": self.pooling,
            "normalize_embeddings": self.options.normalize_embeddings,
            "dtype": dtype_name(self.dtype),
            "engine": self.encoder.engine.engine,
            "device": self.device.type,
            "dimension": self.hidden_size,
        }

    def instruction(self, role: Literal["query", "passage"], given: str | None) -> str | None:
        """What stands before a text: ``given`` (empty: nothing), or where it is None what the checkpoint says."""
        return (
            choose(f"{role}_instruction_for_retrieval", given, getattr(self.stored.instructions, role), self.name)
            or None
        )

    def max_length(self, asked: int) -> int:
        """``asked``, or the most that this model can read, in which case one line says so the first time."""
        if asked < 3:
            raise UsageError(f"a maximum length of {asked} tokens leaves no room for text; give 3 or more")
        if self.longest is not None and asked > self.longest:
            if not self._said_longest:
                self._said_longest = True
                logger.warning("%s reads at most %d tokens: cutting there, not at %d", self.name, self.longest, asked)
            return self.longest
        return asked

    def slab_tokens(self, batch_size: int, max_length: int) -> int:
        """Token budget of a slab (see the top of this file)."""
        if batch_size < 1:
            raise UsageError(f"a batch size of {batch_size}: give 1 or more")
        most = SLAB_TOKENS
        if self.device.type == "cuda":
            most = GPU_SLAB_TOKENS
            if self.encoder.slab_limit is None:
                config: Any = self.encoder.model.config
                hidden = config.hidden_size
                # In half precision: about 8 vectors and 2 wide ones per token of one layer are alive at a time.
                each = 2 * (8 * hidden + 2 * getattr(config, "intermediate_size", 4 * hidden))
                self.encoder.slab_limit = tokens_that_fit(self.device, each, GPU_SLAB_TOKENS, SLAB_TOKENS)
        return min(batch_size * max_length, most)

    def encode(
        self,
        source: Iterable[tuple[Sequence[str], T]],
        max_length: int,
        want: Collection[Kind] = DENSE,
        batch_size: int = 256,
    ) -> Iterator[tuple[Representations, T]]:
        """Representations of each window of texts in ``source``, in order, beside the ``T`` that came with it.

        Dense rows are ``[N, D]``, normalized if the options say so. Reading, tokenizing and, on a GPU, fetching the
        window before run while the model computes.
        """
        self._check_want(want)
        budget = self.slab_tokens(batch_size, max_length)
        previous: tuple[Representations, T] | None = None
        windows = iter(source)
        ahead = list(islice(windows, 2))
        # A single window: no thread is worth its start.
        if len(ahead) < 2 and self.device.type == "cpu" and not self.options.workers:
            for texts, extra in ahead:
                yield self._launch(tokenize(self.tokenizer, texts, max_length), want, budget), extra
            return
        for window in self.pool.windows(chain(ahead, windows), max_length):
            current = self._launch(window.tokens, want, budget), window.extra
            if self.device.type != "cuda":
                yield current
                continue
            # GPU work is queued, not awaited: start the next window before reading the last one's results.
            if previous is not None:
                yield previous
            previous = current
        if previous is not None:
            yield previous

    def encode_rows(self, rows: TokenRows, max_length: int) -> Tensor:
        """Dense vectors ``[N, dimension]`` of texts that are tokens already, as :meth:`encode` gives for their window.

        Args:
            max_length: at which the texts were cut.
        """
        found = self._launch(rows, DENSE, self.slab_tokens(self.options.batch_size, max_length))
        assert found.dense is not None
        return found.dense

    def represent_rows(self, rows: TokenRows, max_length: int, want: Collection[Kind]) -> Representations:
        """The same of any kinds."""
        self._check_want(want)
        return self._launch(rows, want, self.slab_tokens(self.options.batch_size, max_length))

    def _launch(self, rows: TokenRows, want: Collection[Kind], budget: int) -> Representations:
        ids = torch.from_numpy(rows.ids)
        if self.device.type == "cuda":
            ids = ids.pin_memory()
        ids = ids.to(self.device, non_blocking=True).long()
        return self.represent(TokenBatch(ids, rows.lengths, max(rows.lengths, default=0)), want, budget)

    @torch.inference_mode()
    def represent(self, tokens: TokenBatch, want: Collection[Kind], slab_tokens: int = SLAB_TOKENS) -> Representations:
        """Representations of one batch in its order; normalized in float32 if the options say so."""
        found = self.encoder.infer(tokens, want, slab_tokens)
        if self.options.normalize_embeddings:
            if found.dense is not None:
                found.dense = F.normalize(found.dense.float(), dim=-1)
            if found.colbert is not None:
                found.colbert = F.normalize(found.colbert.float(), dim=-1)
        if found.dense is not None and found.dense.shape[1] > self.hidden_size:
            cut = found.dense[:, : self.hidden_size]
            found.dense = F.normalize(cut, dim=-1) if self.options.normalize_embeddings else cut.contiguous()
        return found

    def _check_want(self, want: Collection[Kind]) -> None:
        if not want:
            raise UsageError("nothing to encode: ask for at least one of dense, sparse, colbert")
        if not self.has_heads and set(want) & {"sparse", "colbert"}:
            raise UsageError(
                f"{self.name} has no sparse and colbert heads (sparse_linear.pt, colbert_linear.pt): only dense "
                "vectors come out of it"
            )


def encode_texts(
    encoder: TextEncoder, texts: Sequence[str], max_length: int, instruction: str | None = None
) -> np.ndarray:
    """Dense vectors ``[N, dimension]`` float32 of ``texts``, each after ``instruction``; the rest of a text is cut."""
    prefixed = after_instruction(as_texts(texts)[0], instruction, None)
    windows = ((prefixed[i : i + WINDOW], None) for i in range(0, len(prefixed), WINDOW))
    parts = [np.empty((0, encoder.hidden_size), dtype=np.float32)]
    for found, _ in encoder.encode(windows, encoder.max_length(max_length), DENSE, encoder.options.batch_size):
        assert found.dense is not None
        parts.append(found.dense.float().cpu().numpy())
    return np.concatenate(parts)
