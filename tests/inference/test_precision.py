"""What 'auto' and --fp16 mean on a device, told from what is asked for by name."""

from __future__ import annotations

import pytest
import torch

from FlagEmbedding.inference import precision
from FlagEmbedding.utils import hardware
from FlagEmbedding.utils.errors import UsageError

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def test_names_hold_on_a_cpu() -> None:
    assert precision.resolve_dtype("fp32", CPU) is torch.float32
    assert precision.resolve_dtype("bf16", CPU) is torch.bfloat16
    assert precision.resolve_dtype("fp16", CPU) is torch.float16
    with pytest.raises(UsageError, match="--dtype int4: choose from auto fp32 bf16 fp16"):
        precision.resolve_dtype("int4", CPU)


def test_auto_follows_the_processor_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="FlagEmbedding"):
        dtype = precision.resolve_dtype("auto", CPU)
    expected = torch.bfloat16 if hardware.cpu_has_bf16() else torch.float32
    assert dtype is expected
    assert f"dtype auto: {precision.dtype_name(expected)}" in caplog.text


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_by_name_says_where_it_is_slow(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: fast)  # no machine is both
    assert precision.resolve_dtype("bf16", CPU) is torch.bfloat16
    assert (hardware.NO_CPU_BF16 in caplog.text) == (not fast)
    assert precision.resolve_dtype("auto", CPU) is (torch.bfloat16 if fast else torch.float32)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    assert hardware.tokenizer_workers("cpu") == 0
    assert hardware.tokenizer_workers("cuda") == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert hardware.tokenizer_workers("cuda") == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert hardware.tokenizer_workers("cuda") == 1


def test_fp16_on_a_cpu_is_auto_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert precision.half_precision(CPU) == "auto"
    assert "no fast fp16" in caplog.text
    assert precision.half_precision(torch.device("cuda", 0)) == "fp16"
