"""``FlagModel`` and ``BGEM3FlagModel``: upstream's public classes and verbs on this package's one encoder.

Signatures, results and defaults are those of FlagEmbedding 1.4.2, with these differences, all on purpose:
``dtype`` ('auto', 'fp32', 'bf16', 'fp16') says what to compute in and is honoured on a CPU too; ``use_fp16`` left
alone means fp16 on a GPU and fp32 on a CPU; vectors come back as float32; a mixture-of-experts checkpoint needs no
flag; sparse or colbert output of a checkpoint without heads is an error, not random numbers; a ColBERT score counts
real tokens only, so it does not depend on the other pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from FlagEmbedding.inference import scores as scoring
from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.inference.base import Embedder, Texts, as_list
from FlagEmbedding.inference.m3 import BGEM3ForInference
from FlagEmbedding.inference.scores import LexicalWeights
from FlagEmbedding.inference.text_encoder import DENSE, Kind
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.tokens import special_ids
from FlagEmbedding.utils.errors import UsageError

__all__ = ["BGEM3FlagModel", "BGEM3ForInference", "FlagModel"]

Vectors = np.ndarray | torch.Tensor


class FlagModel(Embedder):
    """Dense vectors of queries and passages; constructor arguments as upstream's, and ``dtype``, ``engine``, ``moe``.

    ``workers``: processes that tokenize ahead (0: a thread). ``moe`` need not be given; it merely must agree with the
    checkpoint. ``convert_to_numpy=False`` returns tensors.
    """

    def __init__(self, model_name_or_path: str, *args: Any, convert_to_numpy: bool = True, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, *args, **kwargs)
        self.convert_to_numpy = convert_to_numpy

    def encode_queries(
        self,
        queries: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
    ) -> Vectors:
        """Vectors of queries, each after the query instruction; shapes as in :meth:`encode`."""
        return self.encode(
            queries,
            batch_size,
            max_length or self.query_max_length,
            convert_to_numpy,
            self.query_instruction_for_retrieval,
            self.query_instruction_format,
        )

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
    ) -> Vectors:
        """Vectors of passages, each after the passage instruction; shapes as in :meth:`encode`."""
        return self.encode(
            corpus,
            batch_size,
            max_length or self.passage_max_length,
            convert_to_numpy,
            self.passage_instruction_for_retrieval,
            self.passage_instruction_format,
        )

    def encode(
        self,
        sentences: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        instruction: str | None = None,
        instruction_format: str | None = None,
    ) -> Vectors:
        """``[D]`` float32 for a text, ``[N, D]`` for a list; normalized unless the model was told otherwise."""
        texts, single = as_list(sentences, instruction, instruction_format or "{}{}")
        to_numpy = self.convert_to_numpy if convert_to_numpy is None else convert_to_numpy
        length, size = max_length or self.passage_max_length, batch_size or self.batch_size
        if to_numpy:
            arrays = self._run(texts, length, size, DENSE, lambda r: self._dense(r).cpu().numpy())
            vectors: Vectors = np.concatenate(arrays) if arrays else np.empty((0, self._width), dtype=np.float32)
        else:
            device = self._encoders[0].device
            tensors = self._run(texts, length, size, DENSE, lambda r: self._dense(r).to(device))
            vectors = torch.cat(tensors) if tensors else torch.empty((0, self._width), device=device)
        return vectors[0] if single else vectors


class BGEM3FlagModel(Embedder):
    """BGE-M3's three outputs: dense vectors, lexical weights, ColBERT vectors. Arguments as upstream's M3Embedder."""

    _heads = True

    def __init__(
        self,
        model_name_or_path: str,
        *args: Any,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name_or_path, *args, **kwargs)
        self.return_dense = return_dense
        self.return_sparse = return_sparse
        self.return_colbert_vecs = return_colbert_vecs

    def encode_queries(
        self,
        queries: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
    ) -> dict[str, Any]:
        """Queries, each after the query instruction; results as in :meth:`encode`."""
        return self.encode(
            queries,
            batch_size,
            max_length or self.query_max_length,
            return_dense,
            return_sparse,
            return_colbert_vecs,
            self.query_instruction_for_retrieval,
            self.query_instruction_format,
        )

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
    ) -> dict[str, Any]:
        """Passages, each after the passage instruction; results as in :meth:`encode`."""
        return self.encode(
            corpus,
            batch_size,
            max_length or self.passage_max_length,
            return_dense,
            return_sparse,
            return_colbert_vecs,
            self.passage_instruction_for_retrieval,
            self.passage_instruction_format,
        )

    def encode(
        self,
        sentences: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        instruction: str | None = None,
        instruction_format: str | None = None,
    ) -> dict[str, Any]:
        """``{'dense_vecs', 'lexical_weights', 'colbert_vecs'}``; None for what was not asked for.

        Dense: ``[N, D]`` float32. Lexical weights: a dictionary (token id as text -> weight) a text. ColBERT: an
        array ``[tokens - 1, D]`` a text. A single text gives the first entry of each instead of a list.
        """
        texts, single = as_list(sentences, instruction, instruction_format or "{}{}")
        asked: list[tuple[Kind, bool]] = [
            ("dense", self.return_dense if return_dense is None else return_dense),
            ("sparse", self.return_sparse if return_sparse is None else return_sparse),
            ("colbert", self.return_colbert_vecs if return_colbert_vecs is None else return_colbert_vecs),
        ]
        want = [kind for kind, wanted in asked if wanted]
        length, size = max_length or self.passage_max_length, batch_size or self.batch_size
        dense, sparse, colbert = self._collect(texts, length, size, want)
        results = {
            "dense_vecs": dense if "dense" in want else None,
            "lexical_weights": sparse if "sparse" in want else None,
            "colbert_vecs": colbert if "colbert" in want else None,
        }
        return {key: value[0] if single and value is not None else value for key, value in results.items()}

    def _collect(
        self, texts: list[str], max_length: int, batch_size: int, want: list[Kind]
    ) -> tuple[np.ndarray, list[LexicalWeights], list[np.ndarray]]:
        skip = special_ids(self.tokenizer)

        def collect(found: Representations) -> tuple[np.ndarray, list[LexicalWeights], list[np.ndarray]]:
            return (
                self._dense(found).cpu().numpy() if "dense" in want else np.empty((0, self._width), np.float32),
                scoring.lexical_weights(found, skip) if "sparse" in want else [],
                scoring.colbert_vectors(found) if "colbert" in want else [],
            )

        parts = self._run(texts, max_length, batch_size, want, collect)
        dense = np.concatenate([part[0] for part in parts]) if parts else np.empty((0, self._width), np.float32)
        return dense, [row for part in parts for row in part[1]], [row for part in parts for row in part[2]]

    def compute_score(
        self,
        sentence_pairs: Sequence[tuple[str, str]] | tuple[str, str],
        batch_size: int | None = None,
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
        weights_for_different_modes: list[float] | None = None,
    ) -> dict[str, Any] | list[Any]:
        """Scores of (query, passage) pairs: ``{'colbert', 'sparse', 'dense', 'sparse+dense', 'colbert+sparse+dense'}``.

        A list a key, or a number a key for a single pair. ``weights_for_different_modes``: for dense, sparse and
        colbert, in this order; the hybrid scores are weighted means. No instruction is added, as upstream.
        """
        if len(sentence_pairs) == 0:
            return []
        weights = weights_for_different_modes or [1.0, 1.0, 1.0]
        if len(weights) != 3 or sum(weights) == 0:
            raise UsageError(f"weights_for_different_modes: expected dense, sparse and colbert weights, got {weights}")
        single = isinstance(sentence_pairs[0], str)
        pairs: list[Any] = [sentence_pairs] if single else list(sentence_pairs)
        size = batch_size or self.batch_size
        want: list[Kind] = ["dense", "sparse", "colbert"]
        results: dict[str, list[float]] = {key: [] for key in scoring.SCORES}
        for start in range(0, len(pairs), WINDOW):
            window = pairs[start : start + WINDOW]
            queries = self._collect([pair[0] for pair in window], max_query_length or self.query_max_length, size, want)
            passages = self._collect(
                [pair[1] for pair in window], max_passage_length or self.passage_max_length, size, want
            )
            for q_dense, q_sparse, q_colbert, p_dense, p_sparse, p_colbert in zip(*queries, *passages, strict=True):
                scores = scoring.combine(
                    float(q_dense @ p_dense),
                    scoring.lexical_matching_score(q_sparse, p_sparse),
                    float(scoring.colbert_score(q_colbert, p_colbert)),
                    weights,
                )
                for key, value in scores.items():
                    results[key].append(value)
        return {key: values[0] for key, values in results.items()} if single else results

    def convert_id_to_token(self, lexical_weights: LexicalWeights | list[LexicalWeights]) -> Any:
        """The same weights under their tokens' text; one dictionary in (or a list of one), one dictionary out."""
        rows = [lexical_weights] if isinstance(lexical_weights, dict) else lexical_weights
        named = [{self.tokenizer.decode([int(token)]): weight for token, weight in row.items()} for row in rows]
        return named[0] if len(named) == 1 else named

    def compute_lexical_matching_score(
        self,
        lexical_weights_1: LexicalWeights | list[LexicalWeights],
        lexical_weights_2: LexicalWeights | list[LexicalWeights],
    ) -> float | np.ndarray:
        """Sum of products over common tokens: a number for two dictionaries, ``[N, M]`` for two lists."""
        if isinstance(lexical_weights_1, dict) and isinstance(lexical_weights_2, dict):
            return scoring.lexical_matching_score(lexical_weights_1, lexical_weights_2)
        if isinstance(lexical_weights_1, list) and isinstance(lexical_weights_2, list):
            rows = [[scoring.lexical_matching_score(a, b) for b in lexical_weights_2] for a in lexical_weights_1]
            return np.array(rows)
        raise ValueError("expected two dictionaries of lexical weights, or two lists of them")

    def colbert_score(self, q_reps: np.ndarray, p_reps: np.ndarray) -> torch.Tensor:
        """Late-interaction score of ``q_reps [Lq, D]`` and ``p_reps [Lp, D]``, a tensor of no dimension."""
        return scoring.colbert_score(q_reps, p_reps)
