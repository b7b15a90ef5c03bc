"""Run by torchrun in test_distributed.py: DDP's gradient under cross-device negatives against one process's.

Each rank takes its half of a batch; rank 0 then computes the whole batch alone and compares every gradient. With
``moe`` one expert is never chosen (its router row is pushed down), which must not hang DDP; nor must ``neg_q_on_rank``,
with which one of the processes alone has negative queries.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from FlagEmbedding import BGEM3Model
from FlagEmbedding.losses.false_negatives import TextKeys
from FlagEmbedding.modeling.backbone import moe_layers
from FlagEmbedding.modeling.encoder import EngineConfig
from FlagEmbedding.utils.distributed import leave

TEXTS = [
    "The Han river runs through Seoul.", "Kimchi is fermented cabbage.", "A castle by the sea, in the north.",
    "The bridge of Isfahan has thirty three arches.", "Snow.", "The lake lies in a valley in the hills.",
    "Ganga flows from the mountains to the bay.", "Jaipur has a palace of winds.", "A desert without a single tree.",
    "Rain falls on the temple roof.", "Busan is a harbour.", "The tower leans a little.",
]  # fmt: skip
QUERIES = ["Which river runs through Seoul?", "How many arches?", "Where does Ganga flow?", "Which roof?"]
ALL_NEG_Q = {
    1: "What is kimchi?",
    2: "Where is the castle?",
    4: "What is white?",
    8: "Where are no trees?",
    11: "What leans?",
}
NEG_Q = dict(ALL_NEG_Q)  # of the case at hand


def features(tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def batch(tokenizer, queries: range, group: int = 3):
    """Queries of ``queries`` with their groups, and the negative queries that belong to them."""
    rows = range(queries.start * group, queries.stop * group)
    owners = [owner for owner in NEG_Q if owner in rows]
    neg_q = None
    if owners:
        neg_q = features(tokenizer, [NEG_Q[o] for o in owners])
        neg_q["owner"] = torch.tensor(owners) - rows.start
    teacher = torch.linspace(0, 2, 12).view(4, 3)[queries.start : queries.stop]
    # To the mask the last query's positive is that of the first again, and its first negative that of the second.
    numbers = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 11])
    positives = torch.arange(queries.start * group, queries.stop * group, group)
    return {
        "keys": TextKeys(torch.tensor(queries), numbers[list(rows)], numbers[positives], torch.arange(len(queries))),
        "query": features(tokenizer, [QUERIES[i] for i in queries]),
        "passage": features(tokenizer, [TEXTS[i] for i in rows]),
        "neg_q": neg_q,
    }, teacher


def build(folder: str, options: dict, cross: bool) -> BGEM3Model:
    torch.manual_seed(3)
    settings = {"temperature": 0.05, "unified_finetuning": False, **options}
    teacher, beyond = settings.pop("teacher", False), settings.pop("beyond", {})
    settings["engine"] = EngineConfig(**settings.pop("engine", {}))
    model = BGEM3Model(folder, negatives_cross_device=cross, **settings).double().train()
    for layer in moe_layers(model.model):
        with torch.no_grad():
            layer.gate.weight[1] = layer.gate.weight[0] * 1.0
            layer.gate.weight[1] -= 1e-3 * torch.sign(layer.gate.weight[0])
    model.objective = replace(model.objective, **beyond)
    model.with_teacher = teacher
    return model


def compare(folder: str, case: str, options: dict) -> None:
    """One case, whose name is printed where it agrees."""
    one = options.pop("neg_q_on_rank", None)
    NEG_Q.clear()
    # Each rank has two queries of three passages.
    NEG_Q.update({passage: text for passage, text in ALL_NEG_Q.items() if one is None or passage // 6 == one})
    rank = dist.get_rank()
    model = build(folder, options, cross=True)
    shared = DistributedDataParallel(model)
    # Unequal in negative queries: rank 0 holds three of them, rank 1 two.
    own, teacher = batch(model.tokenizer, range(2 * rank, 2 * rank + 2))
    output = shared(**own, teacher_scores=teacher if model.with_teacher else None)
    output.loss.backward()
    dist.barrier()
    if rank == 0:
        alone = build(folder, options, cross=False)
        everything, teacher = batch(alone.tokenizer, range(4))
        expected = alone(**everything, teacher_scores=teacher if model.with_teacher else None)
        expected.loss.backward()
        assert abs(float(output.loss) - float(expected.loss)) < 1e-9, (float(output.loss), float(expected.loss))
        masked = {name: int(value) for name, value in output.terms.items() if name.startswith("masked")}
        assert masked == {n: int(v) for n, v in expected.terms.items() if n.startswith("masked")}
        names = {"masked_twins", "masked_by_margin"} if model.objective.masks else set()
        assert masked.keys() == names and all(masked.values()), masked
        greatest = 0.0
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None or not ours.grad.any(), name
                continue
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            greatest = max(greatest, float(theirs.grad.abs().max()))
        assert greatest > 1e-4
        print(f"{case}: gradients agree", flush=True)
    dist.barrier()


def main() -> None:
    dist.init_process_group("gloo")
    for case, options in json.loads(sys.argv[2]).items():
        compare(sys.argv[1], case, options)


if __name__ == "__main__":
    main()
    leave()
