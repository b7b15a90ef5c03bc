"""The compiled kernels of every instruction set of this processor, one after the other, for tests that name them."""

from __future__ import annotations

import pytest

from FlagEmbedding.modeling import kernels
from FlagEmbedding.utils.hardware import cpu_instruction_sets

SETS = [name for name in cpu_instruction_sets() if kernels.load(name) is not None]
NONE = pytest.param("", marks=pytest.mark.skip(reason="no compiled kernels: they need AVX2 or NEON and a C++ compiler"))


@pytest.fixture(params=SETS or [NONE])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels of one instruction set are the ones called."""
    found = kernels.load(request.param)
    monkeypatch.setattr(kernels, "library", lambda: found)
    return str(request.param)


compiled = pytest.mark.usefixtures("instruction_set")
