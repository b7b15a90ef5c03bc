"""Experts over several processes, and on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("starved_expert.py")


def test_experts_without_tokens_do_not_stop_ddp(tmp_path: Path) -> None:
    """Gradients are the mean of what each process would compute by itself, zeros for a starved expert."""
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(tmp_path / "meeting"), str(outputs[rank])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    specification = importlib.util.spec_from_file_location("starved_expert", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    expected = {}
    for rank in range(2):
        layer = script.build()
        layer(script.rows(rank)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad / 2
    for output in outputs:
        found = torch.load(output, weights_only=True)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name])
    assert float(expected["experts.0.weight"].abs().max()) > 0.1
    assert float(expected["experts.2.weight"].abs().max()) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("per_token", [1, 2])
def test_gpu_gives_the_same_layer(per_token: int) -> None:
    from torch import nn

    from FlagEmbedding.modeling.moe import MoEConfig, MoELinear

    torch.manual_seed(0)
    config = MoEConfig("intermediate", None, 3, per_token, "straight_through")
    layer = MoELinear.from_linear(nn.Linear(64, 96), config)
    x = torch.randn(500, 64)
    layer(x).square().sum().backward()
    on_cpu = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    y = layer(x).detach()
    layer.zero_grad()
    layer.cuda()
    got = layer(x.cuda())
    torch.testing.assert_close(got.cpu(), y, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), on_cpu[name], rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        straight = layer(x.cuda())
        layer.router_gradient = "none"
        assert torch.equal(straight, layer(x.cuda()))
