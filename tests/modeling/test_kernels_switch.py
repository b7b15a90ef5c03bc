"""FLAGEMBEDDING_KERNELS, in programs of their own: each value really selects, switches off, or is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from FlagEmbedding.modeling import kernels
from FlagEmbedding.utils.hardware import cpu_instruction_sets

SETS = [name for name in cpu_instruction_sets() if kernels.load(name) is not None]
pytestmark = pytest.mark.skipif(not SETS, reason="no compiled kernels")
PROGRAM = """
import json, re
from pathlib import Path
import torch
from torch import nn
from FlagEmbedding.modeling.attention import packed_attention
from FlagEmbedding.modeling.pointwise import activate, add_norm
from FlagEmbedding.modeling.slabs import Layout
torch.manual_seed(1)
x, y = torch.randn(20, 96), torch.randn(20, 32)
layout, norm = Layout([9, 9, 2], torch.device("cpu")), nn.LayerNorm(32)
def run(dropout):
    torch.manual_seed(8)
    parts = packed_attention(x, layout, 2, dropout=dropout), add_norm(y, y, norm, dropout), activate(nn.GELU(), y)
    return [part.flatten().tolist() for part in parts]
plain, dropped = run(0.0), run(0.5)
maps = Path("/proc/self/maps")
loaded = sorted(set(re.findall(r"_kernels_([a-z0-9]+)", maps.read_text()))) if maps.exists() else None
print(json.dumps({"plain": plain, "dropped": dropped, "loaded": loaded}))
"""


def answer(value: str | None) -> dict[str, Any]:
    environment = {key: text for key, text in os.environ.items() if key != "FLAGEMBEDDING_KERNELS"}
    if value is not None:
        environment["FLAGEMBEDDING_KERNELS"] = value
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1]}


@pytest.fixture(scope="module")
def off() -> dict[str, Any]:
    return answer("0")


def test_zero_calls_torch_alone(off: dict[str, Any]) -> None:
    assert off["loaded"] in ([], None)


@pytest.mark.parametrize("value", [*SETS, None])
def test_a_set_is_the_one_that_computes(value: str | None, off: dict[str, Any]) -> None:
    """The same numbers up to rounding, but for what dropout draws: by that it shows who computed."""
    found = answer(value)
    assert found["loaded"] in ([value or SETS[0]], None)
    for ours, theirs in zip(found["plain"], off["plain"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    attention, norm, gelu = zip(found["dropped"], off["dropped"], strict=True)
    assert attention[0] != pytest.approx(attention[1], abs=1e-2)
    assert norm[0] != pytest.approx(norm[1], abs=1e-2)
    assert gelu[0] == pytest.approx(gelu[1], abs=1e-5)


def test_what_is_no_set_of_this_processor_is_refused() -> None:
    foreign = "avx512" if "neon" in SETS else "neon"
    assert f"FLAGEMBEDDING_KERNELS={foreign}: on this processor" in answer(foreign)["error"]
