"""A device whose memory runs out: slabs are halved and the work goes on, with the same vectors."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from devices.pretended import PretendedDevice, move
from transformers import AutoTokenizer

from FlagEmbedding.modeling.backbone import load_backbone
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.options import EngineConfig
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UserError


def batch(folder: Path) -> TokenBatch:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TokenBatch.from_lists(tokenizer(TEXTS * 4, truncation=True, max_length=40)["input_ids"])


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_out_of_memory_halves_the_slab_and_goes_on(
    engine: str, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), engine=EngineConfig(engine))  # type: ignore[arg-type]
    tokens = batch(tiny_model_dir)
    expected = encoder.infer(tokens, {"dense"}, 10_000).dense
    # Room for 200 tokens of the widest layer (48 numbers each), not for all of them.
    with caplog.at_level(logging.WARNING), PretendedDevice(memory=200 * 48) as device:
        move(encoder)
        there = tokens.pin_memory().to(device.device, non_blocking=True)
        found = encoder.infer(there, {"dense"}, 10_000).dense
        limit = encoder.slab_limit
        caplog.clear()
        again = encoder.infer(there, {"dense"}, 10_000).dense
        assert found is not None and again is not None
        found, again = found.cpu(), again.cpu()
    assert limit is not None and limit <= 200
    assert not caplog.records, "later batches begin with what has been shown to fit"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_a_text_that_does_not_fit_is_said(tiny_model_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir))
    tokens = batch(tiny_model_dir)
    with PretendedDevice(memory=10 * 48) as device:
        move(encoder)
        there = tokens.pin_memory().to(device.device, non_blocking=True)
        with pytest.raises(UserError, match="out of memory on cuda:0 with a single text of"):
            encoder.infer(there, {"dense"}, 10_000)
