"""``FlagModel`` and ``BGEM3FlagModel``: upstream's public classes and verbs on this package's one encoder.

Signatures, results and defaults are those of FlagEmbedding 1.4.2, with these differences, all on purpose:
``dtype`` ('auto', 'fp32', 'bf16', 'fp16') says what to compute in and holds on a CPU too; ``use_fp16`` left
alone means fp16 on a GPU and fp32 on a CPU; vectors come back as float32; a mixture-of-experts checkpoint needs no
flag; sparse or colbert output of a checkpoint without heads is an error, not random numbers; a ColBERT score counts
real tokens only, so it does not depend on the other pairs of a batch; lexical weights are Python's floats; what is no
text, and a keyword that would have no effect, is refused (``texts.py``, ``keywords.py``).

A model may be used by several threads at a time: each call gives the bits that it gives alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import torch

from FlagEmbedding.inference import keywords
from FlagEmbedding.inference import scores as scoring
from FlagEmbedding.inference.arguments import WINDOW
from FlagEmbedding.inference.base import Embedder
from FlagEmbedding.inference.scores import LexicalWeights
from FlagEmbedding.inference.text_encoder import DENSE, Kind
from FlagEmbedding.inference.texts import Pairs, Texts, after_instruction, as_pairs, as_texts
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.tokens import special_ids
from FlagEmbedding.utils.errors import UsageError

Vectors = np.ndarray | torch.Tensor
Lexical = LexicalWeights | list[LexicalWeights]


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
        **others: Any,
    ) -> Vectors:
        """Vectors of queries, each after the query instruction; shapes as in :meth:`encode`."""
        keywords.refuse_instruction(others, "encode_queries")
        max_length = self.query_max_length if max_length is None else max_length
        instruction = self.query_instruction_for_retrieval, self.query_instruction_format
        return self.encode(queries, batch_size, max_length, convert_to_numpy, *instruction, **others)

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **others: Any,
    ) -> Vectors:
        """Vectors of passages, each after the passage instruction; shapes as in :meth:`encode`."""
        keywords.refuse_instruction(others, "encode_corpus")
        instruction = self.passage_instruction_for_retrieval, self.passage_instruction_format
        return self.encode(corpus, batch_size, max_length, convert_to_numpy, *instruction, **others)

    def encode(
        self,
        sentences: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        instruction: str | None = None,
        instruction_format: str | None = None,
        show_progress_bar: bool | None = None,
        **others: Any,
    ) -> Vectors:
        """``[D]`` float32 for a text, ``[N, D]`` for a list; normalized unless the model was told otherwise."""
        keywords.refuse(others, "encode", self.encode)
        texts, single = as_texts(sentences)
        texts = after_instruction(texts, instruction, instruction_format)
        to_numpy = self.convert_to_numpy if convert_to_numpy is None else convert_to_numpy
        device = torch.device("cpu") if to_numpy else self._encoders[0].device

        def collect(found: Representations) -> torch.Tensor:
            return self._dense(found).to(device)

        parts = self._run(texts, max_length, batch_size, DENSE, collect, show_progress_bar)
        vectors = torch.cat([torch.empty((0, self._width), device=device), *parts])
        whole: Vectors = vectors.numpy() if to_numpy else vectors
        return whole[0] if single else whole


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
        convert_to_numpy: bool = True,
        **kwargs: Any,
    ) -> None:
        self._refuse_tensors(convert_to_numpy)
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
        **others: Any,
    ) -> dict[str, Any]:
        """Queries, each after the query instruction; results as in :meth:`encode`."""
        keywords.refuse_instruction(others, "encode_queries")
        max_length = self.query_max_length if max_length is None else max_length
        outputs = return_dense, return_sparse, return_colbert_vecs
        instruction = self.query_instruction_for_retrieval, self.query_instruction_format
        return self.encode(queries, batch_size, max_length, *outputs, *instruction, **others)

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Passages, each after the passage instruction; results as in :meth:`encode`."""
        keywords.refuse_instruction(others, "encode_corpus")
        outputs = return_dense, return_sparse, return_colbert_vecs
        instruction = self.passage_instruction_for_retrieval, self.passage_instruction_format
        return self.encode(corpus, batch_size, max_length, *outputs, *instruction, **others)

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
        show_progress_bar: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """``{'dense_vecs', 'lexical_weights', 'colbert_vecs'}``; None for what was not asked for.

        Dense: ``[N, D]`` float32. Lexical weights: a dictionary (token id as text -> weight) per text. ColBERT: an
        array ``[tokens - 1, Dc]`` per text. A single text gives the first entry of each instead of a list.
        """
        self._refuse_tensors(others.pop("convert_to_numpy", None))
        keywords.refuse(others, "encode", self.encode)
        texts, single = as_texts(sentences)
        texts = after_instruction(texts, instruction, instruction_format)
        asked: dict[Kind, bool] = {
            "dense": self.return_dense if return_dense is None else return_dense,
            "sparse": self.return_sparse if return_sparse is None else return_sparse,
            "colbert": self.return_colbert_vecs if return_colbert_vecs is None else return_colbert_vecs,
        }
        want = [kind for kind, wanted in asked.items() if wanted]
        outputs: Sequence[Any] = self._outputs(texts, max_length, batch_size, want, show_progress_bar)
        names = zip(("dense_vecs", "lexical_weights", "colbert_vecs"), outputs, asked.values(), strict=True)
        return {name: (output[0] if single else output) if wanted else None for name, output, wanted in names}

    @staticmethod
    def _refuse_tensors(convert_to_numpy: bool | None) -> None:
        if convert_to_numpy is False:
            raise UsageError("convert_to_numpy=False: BGEM3FlagModel gives numpy arrays; torch.from_numpy takes them")

    def _outputs(
        self,
        texts: list[str],
        max_length: int | None,
        batch_size: int | None,
        want: list[Kind],
        show_progress_bar: bool | None = None,
    ) -> tuple[np.ndarray, list[LexicalWeights], list[np.ndarray]]:
        """Dense vectors, lexical weights and ColBERT vectors of all texts; nothing in those not wanted."""
        skip = special_ids(self.tokenizer)
        nothing = np.empty((0, self._width), np.float32)

        def collect(found: Representations) -> tuple[np.ndarray, list[LexicalWeights], list[np.ndarray]]:
            return (
                self._dense(found).cpu().numpy() if "dense" in want else nothing,
                scoring.lexical_weights(found, skip) if "sparse" in want else [],
                scoring.colbert_vectors(found) if "colbert" in want else [],
            )

        found = self._run(texts, max_length, batch_size, want, collect, show_progress_bar)
        parts = [(nothing, [], []), *found]
        dense, sparse, colbert = zip(*parts, strict=True)
        return np.concatenate(dense), list(chain.from_iterable(sparse)), list(chain.from_iterable(colbert))

    def compute_score(
        self,
        sentence_pairs: Pairs,
        batch_size: int | None = None,
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
        weights_for_different_modes: Sequence[float] | None = None,
        **others: Any,
    ) -> dict[str, Any] | list[Any]:
        """Scores of (query, passage) pairs: ``{'colbert', 'sparse', 'dense', 'sparse+dense', 'colbert+sparse+dense'}``.

        A list per key, or a number per key for a single pair. ``weights_for_different_modes``: for dense, sparse and
        colbert, in this order; the hybrid scores are weighted means. No instruction is added, as upstream.
        """
        keywords.refuse(others, "compute_score", self.compute_score)
        pairs, single = as_pairs(sentence_pairs)
        weights = [1.0] * 3 if weights_for_different_modes is None else list(weights_for_different_modes)
        numbers = all(isinstance(each, Real) and math.isfinite(each) for each in weights)
        if len(weights) != 3 or not numbers or sum(weights) == 0:
            raise UsageError(f"weights_for_different_modes: expected dense, sparse and colbert weights, got {weights}")
        if not pairs:
            return []
        want: list[Kind] = ["dense", "sparse", "colbert"]
        query_length = self.query_max_length if max_query_length is None else max_query_length
        scores: list[dict[str, float]] = []
        for start in range(0, len(pairs), WINDOW):
            queries, passages = map(list, zip(*pairs[start : start + WINDOW], strict=True))
            of_queries = self._outputs(queries, query_length, batch_size, want)
            of_passages = self._outputs(passages, max_passage_length, batch_size, want)
            scores += [
                scoring.pair_scores(pair[:3], pair[3:], weights) for pair in zip(*of_queries, *of_passages, strict=True)
            ]
        return {key: scores[0][key] if single else [each[key] for each in scores] for key in scoring.SCORES}

    def convert_id_to_token(self, lexical_weights: Lexical) -> Any:
        """The same weights under their tokens' text; one dictionary in (or a list of one), one dictionary out."""
        texts = [lexical_weights] if isinstance(lexical_weights, dict) else lexical_weights
        named = [{self.tokenizer.decode([int(token)]): weight for token, weight in text.items()} for text in texts]
        return named[0] if len(named) == 1 else named

    def compute_lexical_matching_score(
        self, lexical_weights_1: Lexical, lexical_weights_2: Lexical
    ) -> float | np.ndarray:
        """Sum of products over common tokens: a number for two dictionaries, ``[N, M]`` for two lists."""
        if isinstance(lexical_weights_1, dict) and isinstance(lexical_weights_2, dict):
            return scoring.lexical_matching_score(lexical_weights_1, lexical_weights_2)
        if isinstance(lexical_weights_1, list) and isinstance(lexical_weights_2, list):
            pairs = [[scoring.lexical_matching_score(a, b) for b in lexical_weights_2] for a in lexical_weights_1]
            return np.array(pairs)
        raise ValueError("expected two dictionaries of lexical weights, or two lists of them")

    def colbert_score(self, q_reps: np.ndarray, p_reps: np.ndarray) -> torch.Tensor:
        """Late-interaction score of ``q_reps [Lq, Dc]`` and ``p_reps [Lp, Dc]``, a tensor of no dimension."""
        return scoring.colbert_score(q_reps, p_reps)
