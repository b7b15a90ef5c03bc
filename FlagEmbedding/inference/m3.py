"""``BGEM3ForInference``: the published module for callers who tokenize themselves (padded tensors in and out)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from FlagEmbedding.inference.arguments import DtypeName, EncoderArguments, Pooling
from FlagEmbedding.inference.text_encoder import Kind, TextEncoder
from FlagEmbedding.modeling.encoder import Representations
from FlagEmbedding.modeling.options import EngineName
from FlagEmbedding.modeling.tokens import TokenBatch, special_ids
from FlagEmbedding.utils.errors import UsageError


class BGEM3ForInference(nn.Module):
    """A checkpoint with its heads, called with the published keywords.

    :param model_name: hub id or folder; a mixture of experts describes itself.
    :param normlized: L2-normalize dense and colbert vectors (published spelling).
    :param sentence_pooling_method: 'cls', 'mean' or 'last_token'; None: what the checkpoint says, else cls.
    :param unified_finetuning: load the sparse and colbert heads; False: dense only.
    :param colbert_dim: width of the colbert head, -1: the hidden size.
    :param device: where to run; None: the GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        model_name: str,
        normlized: bool = True,
        sentence_pooling_method: str | None = None,
        unified_finetuning: bool = True,
        colbert_dim: int = -1,
        *,
        dtype: str = "fp32",
        device: str | None = None,
        engine: EngineName = "packed",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        options = EncoderArguments(
            encoder=model_name,
            pooling_method=cast(Pooling | None, sentence_pooling_method),
            normalize_embeddings=normlized,
            dtype=cast(DtypeName, dtype),
            device=device,
            engine=engine,
            heads=unified_finetuning,
            colbert_dim=colbert_dim,
            cache_dir=cache_dir,
        )
        loaded = TextEncoder(options)
        self._loaded = loaded
        self.encoder = loaded.encoder  # registered, so that .parameters() and .state_dict() show it
        self.tokenizer = loaded.tokenizer
        self.normlized = normlized
        self.has_heads = loaded.has_heads
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

        :returns: ``dense_vecs [N, D]``; ``sparse_vecs``: token weights ``[N, L, 1]``, 0 at padding, or with
            ``return_sparse_embedding`` their greatest per token id, ``[N, vocabulary]`` with cls, eos, pad and unk
            zero; ``colbert_vecs [N, L - 1, Dc]``, 0 at padding. Only what was asked for.
        """
        asked: dict[Kind, bool] = {"dense": return_dense, "sparse": return_sparse, "colbert": return_colbert}
        want: set[Kind] = {kind for kind, wanted in asked.items() if wanted}
        if not want:
            raise UsageError("ask for at least one of return_dense, return_sparse, return_colbert")
        if want != {"dense"} and not self.has_heads:
            raise UsageError("this checkpoint was loaded without sparse and colbert heads: only dense vectors")
        device = next(self.encoder.parameters()).device
        features = {key: text_input[key].to(device) for key in ("input_ids", "attention_mask")}
        found = self._loaded.represent(TokenBatch.from_padded(features), want)
        output: dict[str, Tensor] = {}
        if found.dense is not None:
            output["dense_vecs"] = found.dense
        if found.token_weights is not None:
            output["sparse_vecs"] = (
                self._over_vocabulary(found) if return_sparse_embedding else _padded_weights(found, features)
            )
        if found.colbert is not None:
            output["colbert_vecs"] = found.colbert_padded()[0]
        return output

    def _over_vocabulary(self, found: Representations) -> Tensor:
        weights = found.token_weights
        assert weights is not None
        weights = weights.reshape(-1)
        lengths = torch.tensor(found.tokens.lengths, device=weights.device)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=weights.device), lengths)
        flat = weights.new_zeros(len(lengths) * self.vocab_size)
        flat.scatter_reduce_(0, rows * self.vocab_size + found.tokens.ids, weights, reduce="amax")
        sparse = flat.view(len(lengths), self.vocab_size)
        sparse[:, special_ids(self.tokenizer)] = 0
        return sparse


def _padded_weights(found: Representations, features: dict[str, Tensor]) -> Tensor:
    assert found.token_weights is not None
    mask = features["attention_mask"].bool()
    padded = found.token_weights.new_zeros(mask.shape)
    padded[mask] = found.token_weights.reshape(-1)
    return padded.unsqueeze(-1)
