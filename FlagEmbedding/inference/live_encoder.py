"""A model that is being trained, as the encoder that its checkpoint would be: a copy, so that training sees nothing."""

from __future__ import annotations

import copy
from typing import Any

from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.precision import resolve_dtype
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.inference.tokenization import TokenizerPool
from FlagEmbedding.modeling.adapters import merge_in_place
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.interchange import StoredModules
from FlagEmbedding.modeling.options import SLAB_TOKENS, EngineConfig
from FlagEmbedding.modeling.packed import prepack_weights
from FlagEmbedding.modeling.positions import longest_input


class LiveEncoder(TextEncoder):
    """``model`` as it is now, in evaluation mode; its vectors are, bit by bit, those of its saved checkpoint.

    Takes the memory of the model's weights once more while it lives (twice on a CPU, which lays them out).

    Args:
        model: left as it is: its mode, its gradients, its caches.
        tokenizer: of the model.
        options: which precision and engine; ``encoder`` is the name in messages.
    """

    def __init__(self, model: M3Encoder, tokenizer: Any, options: EncoderArguments) -> None:
        self.options, self.name, self.folder = options, options.encoder, options.encoder
        self.device = next(model.parameters()).device
        self.dtype = resolve_dtype(options.dtype or "fp32", self.device)
        self.stored = StoredModules(model.pooling, model.normalize, instructions=model.instructions)
        self.pooling = model.pooling
        backbone = copy.deepcopy(model.model).eval()  # type: ignore[no-untyped-call]
        merge_in_place(backbone)
        for module in backbone.modules():  # what training keeps beside its weights
            for name in ("_kept", "_prepacked", "_compiled"):
                module.__dict__.pop(name, None)
        self.encoder = (
            M3Encoder(
                backbone,
                colbert_linear=copy.deepcopy(model.colbert_linear) if options.heads else None,
                sparse_linear=copy.deepcopy(model.sparse_linear) if options.heads else None,
                pooling=model.pooling,
                normalize=False,
                engine=EngineConfig(engine=options.engine),
                projections=copy.deepcopy(list(model.projections)),  # type: ignore[arg-type]
            )
            .to(device=self.device, dtype=self.dtype)
            .eval()
        )
        if self.device.type == "cpu" and self.encoder.engine.engine == "packed":
            prepack_weights(self.encoder.model, SLAB_TOKENS)
        self.tokenizer = tokenizer
        self.hidden_size = self.encoder.dimension
        self.longest = longest_input(self.encoder.model)
        self.pool = TokenizerPool(tokenizer, self.folder)
