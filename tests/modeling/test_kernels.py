"""The compiled kernels of every instruction set of this processor: against the same mathematics in float64, their
masks, their threads, and the switch between them (life without them: make test-isa)."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_sets import SETS, compiled, instruction_set  # noqa: F401 — a fixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from FlagEmbedding.modeling import kernels
from FlagEmbedding.modeling.attention import packed_attention
from FlagEmbedding.modeling.attention_rows import RowAttention, takes
from FlagEmbedding.modeling.pointwise import activate, add_norm
from FlagEmbedding.modeling.slabs import Layout
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hardware import cpu_instruction_sets

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
# Around every boundary of a vector (4, 8, 16), masks drawn at a time (32), a block of queries (24), a tile (48, 64).
LENGTHS = [129, 100, 65, 64, 48, 47, 33, 32, 31, 25, 24, 17, 16, 15, 9, 8, 7, 5, 4, 3, 2, 1]


def test_the_kernels_are_compiled_where_they_can_be() -> None:
    if sys.platform not in ("linux", "darwin") or shutil.which("g++") is None:
        pytest.skip("another system, or no compiler")
    assert list(cpu_instruction_sets()) == SETS


def drawn_masks(probability: float, rows: int, heads: int, lengths: list[int], first: bool) -> list[Tensor]:
    """What RowAttention draws after ``torch.manual_seed(8)``: per row ``[H, Q, L]``, kept ones scaled."""
    threshold, scale = kernels.dropout_threshold(probability)
    torch.manual_seed(8)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    masks, token = [], 0
    for row, length in enumerate(lengths):
        asking = [row] if first else range(token, token + length)
        drawn = [[kernels.keep_mask(seed, q * heads + h, threshold, length) for q in asking] for h in range(heads)]
        masks.append(torch.stack([torch.stack(each) for each in drawn]).double() * scale)
        token += length
    return masks


def reference(
    projections: Tensor, queries: Tensor | None, heads: int, lengths: list[int], masks: list[Tensor] | None
) -> Tensor:
    """Attention in float64, row by row."""
    results = []
    for number, row in enumerate(projections.split(lengths)):
        *asking, key, value = row.chunk(3 if queries is None else 2, dim=1)
        query = asking[0] if asking else queries[number : number + 1]
        q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (query, key, value))
        p = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        p = p if masks is None else p * masks[number]
        results.append((p @ v).transpose(0, 1).reshape(len(query), -1))
    return torch.cat(results)


def make_inputs(heads: int, width: int, lengths: list[int], first: bool, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(sum(lengths), heads * width * (2 if first else 3))] + ([(len(lengths), heads * width)] if first else [])
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@compiled
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
# In bf16 with AMX, tiles take widths that are multiples of 32; the others show the way without them.
@pytest.mark.parametrize("heads, width", [(2, 32), (3, 64), (1, 16), (1, 48), (1, 80), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients(first: bool, dropout: float, heads: int, width: int, dtype: torch.dtype) -> None:
    tensors = make_inputs(heads, width, LENGTHS, first, dtype)
    queries = tensors[1] if first else None
    assert takes(tensors[0], heads, parts=3 - first)
    torch.manual_seed(8)
    found = packed_attention(tensors[0], Layout(LENGTHS, CPU), heads, queries=queries, dropout=dropout)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    masks = drawn_masks(dropout, len(LENGTHS), heads, LENGTHS, first) if dropout else None
    expected = reference(exact[0], exact[1] if first else None, heads, LENGTHS, masks)
    weight = torch.randn_like(expected).to(dtype)
    ours = torch.autograd.grad((found * weight).sum(), tensors)
    theirs = torch.autograd.grad((expected * weight.double()).sum(), exact)
    assert found.dtype == dtype
    # bf16: an output and what enters a gradient are rounded to 8 bits once each.
    tolerance = {"rtol": 2e-6, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a.double(), b, **tolerance)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_row_and_great_scores(dtype: torch.dtype) -> None:
    """8,192 tokens, as BGE-M3 reads, and scores far outside what e^x can hold."""
    torch.manual_seed(3)
    projections = (torch.randn(8192, 3 * 16) * 20).to(dtype)
    found = packed_attention(projections, Layout([8192], CPU), 1)
    query, key, value = projections.double().chunk(3, dim=1)
    rows = torch.arange(0, 8192, 97)
    expected = torch.softmax(query[rows] @ key.T / 4, dim=-1) @ value
    assert torch.isfinite(found.float()).all()
    near = 2e-3 if dtype == torch.float32 else 0.5  # values of about 20; scores in the hundreds keep 3 digits less
    assert float((found[rows].double() - expected).abs().max()) < near


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype) -> None:
    """The same bits in another slab, on any number of threads, and in the middle of one's own queries."""
    (projections,) = make_inputs(2, 32, LENGTHS, False, dtype)
    pieces = projections.detach().split(LENGTHS)
    together = packed_attention(projections.detach(), Layout(LENGTHS, CPU), 2).split(LENGTHS)
    for piece, found in zip(pieces, together, strict=True):
        assert torch.equal(packed_attention(piece, Layout([len(piece)], CPU), 2), found)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            torch.manual_seed(8)
            y = packed_attention(projections, Layout(LENGTHS, CPU), 2, dropout=0.2)
            results.append((y, torch.autograd.grad(y.square().sum(), projections)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled
def test_what_is_not_a_number_shows() -> None:
    """A NaN is never rounded away, so that a run that went wrong is seen."""
    for dtype in (torch.float32, torch.bfloat16):
        (projections,) = make_inputs(2, 32, [20, 5], False, dtype)
        broken = projections.detach().clone()
        broken[3, 0] = float("nan")
        found = packed_attention(broken, Layout([20, 5], CPU), 2).float()
        assert found[3, :32].isnan().all() and found[20:].isfinite().all()
        broken = projections.detach().clone()
        broken[3, 64] = float("nan")  # the key of the first head: every query of the row meets it
        found = packed_attention(broken, Layout([20, 5], CPU), 2).float()
        assert found[:20, :32].isnan().all() and found[:20, 32:].isfinite().all() and found[20:].isfinite().all()
        x = torch.tensor([float("nan"), 1.0]).to(dtype)
        assert kernels.gelu(x).isnan().tolist() == [True, False]


@compiled
def test_tiles_leave_other_libraries_theirs() -> None:
    """oneDNN's own use of the tiles, before and after ours, in one thread: the same product to the bit."""
    torch.manual_seed(0)
    x, weight = torch.randn(100, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    (projections,) = make_inputs(2, 32, LENGTHS, False, torch.bfloat16)
    before = F.linear(x, weight)
    for _ in range(3):
        packed_attention(projections.detach(), Layout(LENGTHS, CPU), 2)
        assert torch.equal(F.linear(x, weight), before)


@compiled
def test_dropout_repeats_under_checkpointing() -> None:
    layout = Layout([9, 9, 4], CPU)
    x = torch.randn(22, 96, requires_grad=True)

    def block(t: Tensor) -> Tensor:
        return RowAttention.apply(t, None, layout, 2, 0.3)

    weight = torch.randn(22, 32)
    gradients = []
    for way in (block, lambda t: checkpoint(block, t, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad((way(x) * weight).sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.skipif(not SETS, reason="no compiled kernels")
def test_the_switch_names_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(value: str) -> str | None:
        monkeypatch.setenv("FLAGEMBEDDING_KERNELS", value)
        found = kernels.library.__wrapped__()
        return None if found is None else Path(found._name).name.split(".")[0]

    assert [chosen(name) for name in SETS] == [f"_kernels_{name}" for name in SETS]
    assert [chosen(name) for name in ("", "1", "on", SETS[0].upper())] == [f"_kernels_{SETS[0]}"] * 4
    assert [chosen(name) for name in ("0", "no", "OFF")] == [None] * 3
    for unknown in ("sse", "neon" if SETS[0] != "neon" else "avx2"):
        with pytest.raises(UsageError, match=f"FLAGEMBEDDING_KERNELS={unknown}: .* 0 or {' or '.join(SETS)}$"):
            chosen(unknown)
    monkeypatch.setattr(kernels, "load", lambda _: None)
    assert chosen("") is None
    with pytest.raises(UsageError, match="not compiled"):
        chosen(SETS[-1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch's switch knows levels of x86-64")
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="this very run is told so")
def test_less_than_the_processor_has_when_torch_is_told_so() -> None:
    code = "from FlagEmbedding.utils.hardware import cpu_instruction_sets; print(*cpu_instruction_sets())"
    for level, sets in (("default", []), ("avx2", ["avx2"])):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [name for name in sets if name in cpu_instruction_sets()]


def mask_by_numpy(seed: int, stream: int, threshold: int, count: int) -> list[int]:
    """What ``Keep`` of ``vectors.h`` draws, whatever the width of the vectors that draw it."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ x >> 16) * np.uint32(0x21F0AAAD)
        x = (x ^ x >> 15) * np.uint32(0xD35A2D97)
        return x ^ x >> 15

    def word(value: int) -> np.ndarray:
        return np.array([value % 2**32], dtype=np.uint32)

    key = mix(word(seed) ^ mix(word((seed >> 32) + 0x9E3779B9)))
    key = mix(key ^ mix(word(stream + 0x85EBCA6B)))
    key = mix(key ^ mix(word((stream >> 32) + 0xC2B2AE35)))
    turns = -(-count // 32)
    bits = mix(key + np.arange(16 * turns, dtype=np.uint32) * np.uint32(0x9E3779B9)).reshape(turns, 16)
    sixteen = np.stack([bits & 0xFFFF, bits >> 16], axis=1).reshape(-1)[:count]
    return (sixteen >= threshold).astype(int).tolist()


@compiled
@pytest.mark.parametrize("count", [1, 4, 31, 33, 1001])
def test_masks_are_the_same_on_every_processor(count: int) -> None:
    for seed, stream, threshold in ((0, 0, 6554), (2**62 - 3, 5, 32768), (77, 2**33 + 1, 1), (1, 1, 0), (9, 9, 65535)):
        found = kernels.keep_mask(seed, stream, threshold, count).tolist()
        assert found == mask_by_numpy(seed, stream, threshold, count)


@compiled
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_are_drawn_with_the_given_probability(probability: float) -> None:
    threshold, scale = kernels.dropout_threshold(probability)
    mask = torch.stack([kernels.keep_mask(77, stream, threshold, 1001) for stream in range(1000)]).float()
    deviation = math.sqrt(probability * (1 - probability) / mask.numel())
    assert abs(float(mask.mean()) - (1 - probability)) < 4 * deviation
    # Neighbors in a stream, the two halves of one number, the same place of the next stream: independent.
    x = mask - (1 - probability)
    for shift, dim in ((1, 0), (1, 1), (16, 1), (32, 1), (64, 1)):
        covariance = float((x * x.roll(shift, dim)).mean()) / (probability * (1 - probability))
        assert abs(covariance) < 4 / math.sqrt(mask.numel()), (shift, dim)
    # No place and no stream is favored.
    assert float((mask.mean(0) - (1 - probability)).abs().max()) < 6 * deviation * math.sqrt(1001)
    assert float((mask.mean(1) - (1 - probability)).abs().max()) < 6 * deviation * math.sqrt(1000)
    assert scale == pytest.approx(1 / (1 - probability), rel=2e-4)
    other = kernels.keep_mask(78, 0, threshold, 1001).float()
    assert not torch.equal(other, mask[0])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0])])
    x = x.to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = activate(nn.GELU(), x), F.gelu(exact)
    weight = torch.randn(len(x)).to(dtype)
    (ours,) = torch.autograd.grad((found * weight).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weight.double()).sum(), exact)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(ours.double(), theirs, **tolerance)


@compiled
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("width", [16, 48, 384])
@pytest.mark.parametrize(
    "y_dtype, dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_add_norm(probability: float, width: int, y_dtype: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, eps=0.3)  # so great that another one shows
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    y = torch.randn(50, width).to(y_dtype).requires_grad_()
    residual = (torch.randn(50, width) + 3).to(dtype).requires_grad_()
    torch.manual_seed(8)
    found = add_norm(y, residual, norm, probability)
    threshold, scale = kernels.dropout_threshold(probability)
    torch.manual_seed(8)
    seed = int(torch.randint(2**62, (), dtype=torch.int64)) if probability else 0
    mask = torch.stack([kernels.keep_mask(seed, row, threshold, width) for row in range(50)]).double() * scale
    exact = [each.detach().double().requires_grad_() for each in (y, residual, norm.weight, norm.bias)]
    expected = F.layer_norm(exact[0] * mask + exact[1], (width,), exact[2], exact[3], 0.3)
    weight = torch.randn(50, width).to(dtype)
    ours = torch.autograd.grad((found * weight).sum(), [y, residual, norm.weight, norm.bias])
    theirs = torch.autograd.grad((expected * weight.double()).sum(), exact)
    assert found.dtype == dtype and ours[0].dtype == y_dtype
    exactly = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
    torch.testing.assert_close(found.double(), expected, rtol=exactly[dtype], atol=exactly[dtype])
    for a, b in zip(ours, theirs, strict=True):
        near = exactly[a.dtype] if dtype == torch.float32 else 0.15
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near)


@compiled
def test_other_layers_than_the_kernels_know_are_called() -> None:
    calls = []
    norm = nn.LayerNorm(32)
    norm.register_forward_hook(lambda *_: calls.append("hook"))
    y, residual = torch.randn(3, 32), torch.randn(3, 32)
    torch.testing.assert_close(add_norm(y, residual, norm, 0.0), F.layer_norm(y + residual, (32,)))
    assert calls == ["hook"]
    plain = nn.LayerNorm(20)
    y, residual = torch.randn(3, 20), torch.randn(3, 20)
    torch.testing.assert_close(add_norm(y, residual, plain, 0.0), plain(y + residual))
    tanh = nn.GELU(approximate="tanh")
    torch.testing.assert_close(activate(tanh, y), tanh(y))
    empty = nn.LayerNorm(32)
    assert add_norm(torch.empty(0, 32), torch.empty(0, 32), empty, 0.0).shape == (0, 32)


def test_kernels_of_other_sources_are_not_called(
    instruction_set: str,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After an update without installing again the binary is an old one, whose functions take other arguments."""
    here = Path(kernels.__file__).parent
    for file in here.iterdir():
        if file.suffix in (".cpp", ".h", ".so"):
            shutil.copy(file, tmp_path)
    (binary,) = tmp_path.glob(f"_kernels_{instruction_set}*")
    assert kernels._open(binary) is not None
    with (tmp_path / "attention.h").open("a") as stream:
        stream.write("// another line\n")
    assert kernels._open(binary) is None
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"not a library")
    assert kernels._open(foreign) is None
    assert caplog.text.count("install again") == 2
