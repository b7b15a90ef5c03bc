"""The same code on a GPU gives what it gives on the CPU (skipped without one)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from FlagEmbedding import FlagModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TEXTS = [f"{i} {'river ' * (i % 23)}" for i in range(300)]


def test_fp32_vectors_are_those_of_the_cpu(tiny_model_dir: Path) -> None:
    expected = FlagModel(str(tiny_model_dir), devices="cpu").encode(TEXTS)
    found = FlagModel(str(tiny_model_dir), devices="cuda:0", use_fp16=False, workers=2).encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "auto"])
def test_half_precision_stays_near(tiny_model_dir: Path, dtype: str) -> None:
    expected = FlagModel(str(tiny_model_dir), devices="cpu").encode(TEXTS)
    found = FlagModel(str(tiny_model_dir), devices="cuda:0", dtype=dtype).encode(TEXTS)
    assert ((found * expected).sum(axis=1) > 0.999).all()
