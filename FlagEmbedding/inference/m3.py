"""``BGEM3ForInference``: the published module for callers who tokenize themselves (padded tensors in and out)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from FlagEmbedding.inference.arguments import DtypeName, EncoderArguments, Pooling
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.modeling.options import EngineName
from FlagEmbedding.modeling.tokens import TokenBatch, special_ids
from FlagEmbedding.utils.errors import UsageError


class BGEM3ForInference(nn.Module):
    """A checkpoint with its heads, called with the published keywords.

    Args:
        model_name: hub id or folder; a mixture of experts describes itself.
        normlized: L2-normalize dense and colbert vectors (published spelling).
        sentence_pooling_method: ``cls``, ``mean`` or ``last_token``; None: what the checkpoint says, else cls.
        unified_finetuning: load the sparse and colbert heads; False: dense only.
        colbert_dim: width of the colbert head, -1: as stored.
        device: where to run; None: the GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        model_name: str,
        normlized: bool = True,
        sentence_pooling_method: Pooling | None = None,
        unified_finetuning: bool = True,
        colbert_dim: int = -1,
        *,
        dtype: DtypeName = "fp32",
        device: str | None = None,
        engine: EngineName = "packed",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        options = EncoderArguments(
            encoder=model_name,
            pooling_method=sentence_pooling_method,
            normalize_embeddings=normlized,
            dtype=dtype,
            device=device,
            engine=engine,
            heads=unified_finetuning,
            colbert_dim=colbert_dim,
            cache_dir=cache_dir,
        )
        self._loaded = TextEncoder(options)
        self.encoder = self._loaded.encoder  # registered, so that .parameters() and .state_dict() show it
        self.tokenizer = self._loaded.tokenizer
        self.normlized = normlized
        self.has_heads = self._loaded.has_heads
        self.vocab_size: int = self.encoder.model.config.vocab_size

    @property
    def model(self) -> nn.Module:
        """The transformer below the heads."""
        return self.encoder.model

    @torch.inference_mode()
    def forward(
        self,
        text_input: dict[str, Tensor],
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert: bool = False,
        return_sparse_embedding: bool = False,
    ) -> dict[str, Tensor]:
        """Encode ``text_input`` (``input_ids`` and ``attention_mask``, ``[N, L]``).

        Returns:
            ``dense_vecs [N, D]``; ``sparse_vecs``: token weights ``[N, L, 1]``, 0 at padding, or with
            ``return_sparse_embedding`` their greatest per token id, ``[N, vocabulary]`` with cls, eos, pad and unk
            zero; ``colbert_vecs [N, L - 1, Dc]``, 0 at padding. Only what was asked for.
        """
        asked: dict[Kind, bool] = {"dense": return_dense, "sparse": return_sparse, "colbert": return_colbert}
        want = {kind for kind, wanted in asked.items() if wanted}
        if not want:
            raise UsageError("ask for at least one of return_dense, return_sparse, return_colbert")
        device = next(self.encoder.parameters()).device
        features = {key: text_input[key].to(device) for key in ("input_ids", "attention_mask")}
        found = self._loaded.represent(TokenBatch.from_padded(features), want)
        output: dict[str, Tensor] = {}
        if found.dense is not None:
            output["dense_vecs"] = found.dense
        if found.token_weights is not None:
            mask = features["attention_mask"].bool()
            padded = found.token_weights.new_zeros(mask.shape)
            padded[mask] = found.token_weights
            output["sparse_vecs"] = padded.unsqueeze(-1)
            if return_sparse_embedding:
                output["sparse_vecs"] = self._over_vocabulary(padded, features["input_ids"])
        if found.colbert is not None:
            output["colbert_vecs"] = found.colbert_padded()[0]
        return output

    def _over_vocabulary(self, weights: Tensor, ids: Tensor) -> Tensor:
        """Each token id's greatest weight, ``[N, vocabulary]``, from weights and ids ``[N, L]``."""
        sparse = weights.new_zeros(len(ids), self.vocab_size)
        sparse.scatter_reduce_(1, ids, weights, reduce="amax")
        sparse[:, special_ids(self.tokenizer)] = 0
        return sparse
