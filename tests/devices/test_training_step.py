"""A training step on a device, pretended on the CPU: the same numbers, no wait for the device, dropout that repeats."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, write_tiny
from devices.pretended import PretendedDevice, move
from transformers import AutoTokenizer

from FlagEmbedding.finetune.arguments import ModelArguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.losses.objective import ObjectiveArguments
from FlagEmbedding.modeling.options import EngineConfig, FfnPart, MoEConfig
from FlagEmbedding.modeling.tokens import TokenBatch

SEVERAL_SLABS, ONE_SLAB = 64, 0


@dataclass(frozen=True)
class Step:
    """What is trained, and how."""

    moe: str | None = None
    experts_per_token: int = 1
    only_train: str | None = None
    unified: bool = False
    dtype: torch.dtype | None = None
    grad_cache: bool = False
    slab_tokens: int = SEVERAL_SLABS
    dropout: bool = False


@dataclass
class Taken:
    """One step's loss, gradients and what the host waited for."""

    loss: float
    gradient: torch.Tensor
    waits: list[str]
    kernels: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return write_tiny(tmp_path_factory.mktemp("tiny"), "xlmr", **rates)


def prepare(folder: Path, step: Step) -> tuple[BiEncoder, dict[str, Any]]:
    """A model and a batch, on the CPU."""
    torch.manual_seed(0)
    model = BiEncoder(
        ModelArguments(model_name_or_path=str(folder)),
        MoEConfig(step.moe, step.only_train, 2 if step.moe else 1, step.experts_per_token),  # type: ignore[arg-type]
        ObjectiveArguments(unified_finetuning=step.unified, penalty_weight=0.1, temperature=0.05),
        EngineConfig(grad_cache=step.grad_cache, slab_tokens=step.slab_tokens),
    ).train(step.dropout)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str]) -> TokenBatch:
        return TokenBatch.from_lists(tokenizer(texts, truncation=True, max_length=40)["input_ids"])

    batch: dict[str, Any] = {
        "query": encode(TEXTS[:2]),
        "passage": encode(TEXTS + TEXTS[:2]),
        "neg_q": encode(TEXTS[2:4]),
        "owner": torch.tensor([1, 5]),
    }
    return model, batch


def take(folder: Path, step: Step, device: PretendedDevice | None) -> Taken:
    model, batch = prepare(folder, step)
    kind = "cpu" if device is None else device.device.type
    with device or nullcontext():
        if device is not None:
            move(model)
            batch = {name: value.pin_memory().to(device.device, non_blocking=True) for name, value in batch.items()}
            device.waits.clear()
        with torch.autocast(kind, dtype=step.dtype, enabled=step.dtype is not None):
            output = model(**batch)
        assert output.loss is not None
        output.loss.backward()
        waits, kernels = ([], []) if device is None else (device.waits[:], device.kernels)
    found = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return Taken(float(output.loss.detach()), torch.cat(found), waits, kernels)


def apart(one: Taken, other: Taken) -> float:
    return float((one.gradient - other.gradient).norm() / other.gradient.norm())


@pytest.mark.parametrize(
    "step",
    [
        Step(),
        Step(slab_tokens=ONE_SLAB),
        Step(moe="intermediate"),
        Step(moe="output", experts_per_token=2),
        Step(unified=True),
        Step(grad_cache=True, only_train="output"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_a_device_gives_the_losses_and_gradients_of_the_cpu(folder: Path, step: Step, kind: str) -> None:
    expected, found = take(folder, step, None), take(folder, step, PretendedDevice(kind))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert apart(found, expected) < 1e-4


@pytest.mark.parametrize(
    "step",
    [
        Step(dropout=True),
        Step(dropout=True, dtype=torch.bfloat16),
        Step(dropout=True, dtype=torch.bfloat16, moe="intermediate"),
        Step(dropout=True, dtype=torch.bfloat16, moe="output"),
        Step(dropout=True, moe="intermediate"),
        Step(dropout=True, moe="output", experts_per_token=2),
        Step(dropout=True, dtype=torch.float16, moe="intermediate"),
        Step(dropout=True, dtype=torch.bfloat16, only_train="intermediate", moe="intermediate"),
        Step(dropout=True, dtype=torch.bfloat16, grad_cache=True),
        Step(dropout=True, dtype=torch.bfloat16, unified=True),
    ],
    ids=str,
)
def test_nothing_of_forward_and_backward_waits_for_the_device(folder: Path, step: Step) -> None:
    assert take(folder, step, PretendedDevice()).waits == []


def test_the_pretended_device_notices_a_wait() -> None:
    with PretendedDevice() as device:
        numbers = torch.arange(4).pin_memory().to("cuda", non_blocking=True)
        assert numbers.device.type == "cuda" and device.waits == []
        for wait in (
            lambda: int(numbers.sum()),
            lambda: numbers[numbers > 1],
            lambda: torch.tensor([1], device="cuda"),
            numbers.cpu,
            lambda: torch.arange(3).to("cuda", non_blocking=True),
            numbers.tolist,
            numbers.nonzero,
        ):
            before = len(device.waits)
            wait()
            assert len(device.waits) > before
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            numbers + torch.arange(4)


@pytest.mark.parametrize("slab_tokens", [SEVERAL_SLABS, ONE_SLAB])
@pytest.mark.parametrize("only_train", [None, "intermediate"])
def test_recomputation_draws_the_dropout_of_the_forward(folder: Path, only_train: str | None, slab_tokens: int) -> None:
    plain = Step(dropout=True, only_train=only_train, slab_tokens=slab_tokens)
    cached = Step(dropout=True, only_train=only_train, slab_tokens=slab_tokens, grad_cache=True)
    expected, found = (take(folder, step, PretendedDevice()) for step in (plain, cached))
    assert found.loss == expected.loss
    assert apart(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("capability", "bf16", "heads", "kernels"),
    [((9, 0), True, 2, {"flash"}), ((8, 0), True, 2, {"flash"}), ((7, 5), False, 2, set()), ((9, 0), True, 8, set())],
    ids=["H100", "A100", "T4", "heads of 4"],
)
def test_kernels_are_asked_for_what_they_can(
    tmp_path: Path, capability: tuple[int, int], bf16: bool, heads: int, kernels: set[str]
) -> None:
    changes = {"num_attention_heads": heads, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    folder = write_tiny(tmp_path, "xlmr", **changes)
    step = Step(dropout=True, dtype=torch.bfloat16)
    assert set(take(folder, step, PretendedDevice(capability=capability, bf16=bf16)).kernels) == kernels


@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize(
    ("capability", "width", "native"),
    [((9, 0), 48, True), ((10, 0), 48, True), ((9, 0), 52, False), ((8, 0), 48, False), ((12, 0), 48, False)],
    ids=["H100", "B200", "rows of 104 bytes", "A100", "RTX 5090"],
)
def test_experts_wait_for_no_device_whatever_it_has(
    tmp_path: Path, place: FfnPart, capability: tuple[int, int], width: int, native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The grouped product only where it has a kernel; the same loss and gradients both ways, and no wait."""
    calls: list[int] = []
    grouped = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or grouped(*a, **k))
    folder = write_tiny(tmp_path, "xlmr", intermediate_size=width)
    step = Step(dtype=torch.bfloat16, moe=place)
    expected, found = take(folder, step, None), take(folder, step, PretendedDevice(capability=capability))
    assert found.waits == [] and bool(calls) == native
    assert found.loss == pytest.approx(expected.loss, rel=1e-2)
    assert apart(found, expected) < 0.1


def test_frozen_weights_are_cast_once(folder: Path) -> None:
    """Not for every slab again: what is cast per step does not grow with the number of slabs."""
    casts = {}
    for slab_tokens in (SEVERAL_SLABS, ONE_SLAB):
        step = Step(dtype=torch.bfloat16, only_train="output", slab_tokens=slab_tokens)
        model, batch = prepare(folder, step)
        frozen = {each.data_ptr() for each in model.parameters() if not each.requires_grad and each.dim() == 2}
        with PretendedDevice() as device:
            move(model)
            there = {name: value.pin_memory().to(device.device, non_blocking=True) for name, value in batch.items()}
            for number in range(2):
                device.casts.clear()
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    model(**there)
                casts[slab_tokens, number] = sum(pointer in frozen for pointer in device.casts)
    assert casts[SEVERAL_SLABS, 0] == casts[ONE_SLAB, 0] > 0
    assert casts[SEVERAL_SLABS, 1] == casts[ONE_SLAB, 1] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("moe", [None, "intermediate"])
def test_a_real_device_is_not_waited_for(folder: Path, moe: FfnPart | None) -> None:
    """The same under CUDA itself, which raises where the host would wait."""
    model, batch = prepare(folder, Step(moe=moe, dropout=True))
    model.to("cuda")
    batch = {name: value.pin_memory().to("cuda", non_blocking=True) for name, value in batch.items()}

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(**batch)
        assert output.loss is not None
        output.loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
