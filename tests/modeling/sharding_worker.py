"""Run by torchrun in test_sharding.py: FSDP2 on two processes against one process, packed and padded.

Each rank trains on its own rows, of which rank 1 has no negative queries and fewer tokens; one process then takes both
halves in turn. Loss, gradients and the state dict must agree, and a batch outside the forward must be encoded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import TEXTS

from FlagEmbedding.finetune.arguments import ModelArguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.losses.objective import ObjectiveArguments
from FlagEmbedding.modeling.options import EngineConfig, MoEConfig
from FlagEmbedding.modeling.sharding import shard
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import leave


def build(folder: str, options: dict[str, Any]) -> BiEncoder:
    torch.manual_seed(3)
    return (
        BiEncoder(
            ModelArguments(model_name_or_path=folder),
            MoEConfig(options.get("moe"), options.get("only_train"), 2 if options.get("moe") else 1),
            ObjectiveArguments(penalty_weight=0.1, temperature=0.05, unified_finetuning=options.get("unified", False)),
            EngineConfig(engine=options.get("engine", "packed"), slab_tokens=48),
        )
        .double()
        .train()
    )


def batch(model: BiEncoder, rank: int) -> dict[str, Any]:
    def encode(texts: list[str]) -> TokenBatch:
        return TokenBatch.from_lists(model.tokenizer(texts, truncation=True, max_length=40)["input_ids"])

    if rank:
        return {"query": encode(TEXTS[4:]), "passage": encode(TEXTS[4:] * 2)}
    passages = TEXTS[:4] * 2
    owner = torch.tensor([1, 3, 6])
    return {"query": encode(TEXTS[:2]), "passage": encode(passages), "neg_q": encode(TEXTS[2:5]), "owner": owner}


def compare(folder: str, case: str, options: dict[str, Any]) -> None:
    """One case, whose name is printed where it agrees."""
    rank = dist.get_rank()
    alone, model = build(folder, options), build(folder, options)
    shard(model)
    assert isinstance(model, FSDPModule) and all(isinstance(each, DTensor) for each in model.parameters())
    own = batch(alone, rank)
    before = model.encode_alone(own["passage"]).dense
    torch.testing.assert_close(before, alone.encode_alone(own["passage"]).dense, rtol=0, atol=1e-12)
    loss = model(**own).loss
    loss.backward()
    expected = [alone(**batch(alone, each)).loss for each in range(2)]
    (sum(expected) / 2).backward()
    torch.testing.assert_close(loss, expected[rank], rtol=0, atol=1e-12)
    worst = 0.0
    for (name, sharded), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (sharded.grad is None) == (whole.grad is None), name
        if sharded.grad is not None:
            worst = max(worst, float((sharded.grad.full_tensor() - whole.grad).abs().max()))
    assert worst < 1e-12, worst
    # A second step, after the weights have moved.
    for each in (model, alone):
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
    moved = model(**own).loss
    torch.testing.assert_close(moved, alone(**own).loss, rtol=0, atol=1e-12)
    assert abs(float(moved) - float(loss)) > 1e-6
    if rank == 0:
        print(f"{case}: one process and two agree", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    for case, options in json.loads(sys.argv[2]).items():
        compare(sys.argv[1], case, options)
    leave()


if __name__ == "__main__":
    main()
