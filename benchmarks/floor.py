"""The least time that an encoder's matrix products can take, measured in the process that asks.

Only the six linear layers of every encoder layer, over as many tokens as there really are: no padding, no attention,
nothing pointwise, nothing else. An engine's time over this one says how far it stands from the limit of the matrix
products. Layers that an engine leaves out (the last one computes first tokens alone) are counted in full here, so an
engine may come near 1 or past it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

SLAB = 4096  # rows of one product
MOST = 8_192  # tokens that are measured; more take as much longer


def products(model: Path) -> tuple[list[tuple[int, int]], int]:
    """Inputs and outputs of a layer's six linear layers, and the number of layers."""
    config = json.loads((model / "config.json").read_text())
    narrow, wide = config["hidden_size"], config["intermediate_size"]
    return [(narrow, narrow)] * 4 + [(narrow, wide), (wide, narrow)], config["num_hidden_layers"]


def operations(model: Path, tokens: int, backward: bool) -> int:
    """Floating-point operations of these products; a backward is two more of each."""
    shapes, layers = products(model)
    return 2 * tokens * layers * sum(a * b for a, b in shapes) * (3 if backward else 1)


@torch.inference_mode()
def floor_seconds(model: Path, tokens: int, dtype: torch.dtype, device: str, backward: bool) -> tuple[float, float]:
    """Wall and processor seconds of the products alone."""
    scale, tokens = max(1.0, tokens / MOST), min(tokens, MOST)
    shapes, layers = products(model)
    weights = [[torch.randn(out, inp, dtype=dtype, device=device) for inp, out in shapes] for _ in range(layers)]
    biases = {out: torch.zeros(out, dtype=dtype, device=device) for _, out in shapes}
    inputs = {inp: torch.randn(SLAB, inp, dtype=dtype, device=device) for inp, _ in shapes}
    gradients = {out: torch.randn(SLAB, out, dtype=dtype, device=device) for _, out in shapes}

    def once(rows: int) -> None:
        for layer in weights:
            for weight, (inp, out) in zip(layer, shapes, strict=True):
                F.linear(inputs[inp][:rows], weight, biases[out])
        if not backward:
            return
        for layer in reversed(weights):
            for weight, (inp, out) in zip(layer, shapes, strict=True):
                torch.mm(gradients[out][:rows], weight)
                torch.mm(gradients[out][:rows].t(), inputs[inp][:rows])

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    once(min(SLAB, tokens))
    wait()
    wall, busy = time.perf_counter(), time.process_time()
    for start in range(0, tokens, SLAB):
        once(min(SLAB, tokens - start))
    wait()
    return (time.perf_counter() - wall) * scale, (time.process_time() - busy) * scale


def compare_with_floor(
    model: Path, tokens: int, dtype: torch.dtype, device: str, backward: bool, wall: float, busy: float
) -> dict[str, float]:
    """``of_floor``: the floor's time as a share of the time taken; processor time where one CPU thread works."""
    floor_wall, floor_busy = floor_seconds(model, tokens, dtype, device, backward)
    by_processor = device == "cpu" and torch.get_num_threads() == 1
    share = floor_busy / busy if by_processor else floor_wall / wall
    speed = operations(model, tokens, backward) / (floor_busy if by_processor else floor_wall) / 1e9
    return {"of_floor": round(share, 3), "floor_gflops": round(speed, 1)}
