"""Run by test_moe_processes.py, one process a rank: DDP over a layer one of whose experts gets no token on each rank.

Arguments: rank, number of ranks, a file to meet at, the file to write.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from FlagEmbedding.modeling.moe import MoEConfig, MoELinear
from FlagEmbedding.utils.distributed import leave


def build() -> MoELinear:
    torch.manual_seed(0)
    layer = MoELinear.from_linear(nn.Linear(6, 4), MoEConfig(moe="intermediate", num_experts=3))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0] * 6, [-1.0] * 6, [0.0] * 6]))
    return layer.double()


def rows(rank: int) -> torch.Tensor:
    """Positive on rank 0 (expert 0 alone), negative on rank 1 (expert 1 alone); expert 2 gets nothing anywhere."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.rand(5, 6, generator=generator, dtype=torch.float64) + 0.1) * (1 if rank == 0 else -1)


def main(rank: int, world: int, meeting: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    layer = DistributedDataParallel(build(), find_unused_parameters=False)
    for _ in range(2):  # the second forward raises if a parameter was left out of the first
        layer.zero_grad()
        layer(rows(rank)).square().sum().backward()
    torch.save({name: p.grad for name, p in layer.module.named_parameters()}, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    leave()
