"""The guide of ``--guide_model``: a frozen checkpoint whose cosines say which passages answer a query of the batch.

It reads the texts as they stand in the rows, by its own tokenizer, behind its own instructions, through the engine that
encodes everywhere else; no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.negatives import Guided
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder, encode_texts
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


class Guide:
    """A loaded guide.

    Args:
        arguments: of the run; texts are cut at ``--query_max_len`` and ``--passage_max_len`` of its own tokens.

    Raises:
        UserError: the checkpoint is not there, or none of ours.
    """

    def __init__(self, arguments: Arguments) -> None:
        training, guide = arguments.training, arguments.objective.guide_model
        assert guide is not None
        self.encoder = TextEncoder(
            EncoderArguments(
                encoder=guide,
                dtype=training.dtype_name,
                device=str(training.device),
                workers=0,
                cache_dir=arguments.model.cache_dir,
            )
        )
        self.lengths = (arguments.data.query_max_len, arguments.data.passage_max_len)
        self.instructions = (self.encoder.instruction("query", None), self.encoder.instruction("passage", None))
        logger.info("guide %s: %.2f GB beside the model", guide, self.held / 1e9)

    @property
    def held(self) -> int:
        """Bytes of its weights."""
        return sum(each.numel() * each.element_size() for each in self.encoder.encoder.parameters())

    def __call__(self, texts: Mapping[str, Sequence[str]]) -> Guided:
        """Unit vectors of ``texts["query"]`` and ``texts["passage"]``."""
        parts: list[Tensor] = []
        for role, length, before in zip(("query", "passage"), self.lengths, self.instructions, strict=True):
            vectors = torch.from_numpy(encode_texts(self.encoder, texts[role], length, before))
            parts.append(vectors.to(self.encoder.device))
        return Guided(*parts)
