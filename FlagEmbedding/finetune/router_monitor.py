"""What the routers do during training: load, entropy, and how many tokens have changed their expert.

Load and entropy are counted over the real tokens of every forward between two log lines. "Changed" is measured on a
probe: tokens of the first batch, routed once before the first step and again at every log line, without dropout or
noise. The probe and its first routing travel with each checkpoint, so a resumed run measures from the same start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import IntervalStrategy, TrainerState, TrainingArguments

from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.losses.router import routing_statistics
from FlagEmbedding.modeling.moe import record_routing
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.io import follow_umask

PROBE_FILE = "router_probe.safetensors"
PROBE_PASSAGES = 16


def is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a line of the log may follow the optimizer step that is being computed."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    return args.logging_strategy == IntervalStrategy.EPOCH  # any step may be its last


class RouterMonitor:
    """Accumulates routing statistics between log lines and compares the probe's routing with its first.

    ``sums`` since the last log line, float64, empty when nothing was observed: ``load`` ``[layers, E]``, the choices
    that fell on each expert; ``entropy`` ``[layers]``, summed over tokens; ``tokens`` ``[layers]``, of which the last
    layer has fewer where it routes first tokens alone for cls vectors.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._probe: TokenBatch | None = None
        self._first: list[Tensor] = []  # per layer [T, K], experts chosen at the start

    def observe(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Add one forward's routing: per layer the logits ``[T, E]`` and the chosen experts ``[T, K]``."""
        statistics = [routing_statistics(logits, experts) for logits, experts in layers]
        load = torch.stack([item.tokens_per_expert for item in statistics]).double()
        sizes = [len(logits) for logits, _ in layers]
        entropy = torch.stack([item.entropy.double() * size for item, size in zip(statistics, sizes, strict=True)])
        tokens = torch.tensor(sizes, dtype=torch.float64)  # stays here: nothing waits for a device
        for name, value in (("load", load), ("entropy", entropy), ("tokens", tokens)):
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def start_probe(self, model: BiEncoder, passages: TokenBatch) -> None:
        """Choose the probe from the first batch, once, and remember how it is routed now."""
        if self._probe is None:
            self._probe = passages.select(range(min(PROBE_PASSAGES, len(passages))))
            self._first = self._route_probe(model)

    def summary(self, model: BiEncoder) -> dict[str, Any]:
        """Statistics since the last call, which start again from zero. Empty when nothing was observed."""
        if not self.sums:
            return {}
        share = self.sums["load"] / self.sums["load"].sum(dim=1, keepdim=True)
        entropy = self.sums["entropy"].cpu() / self.sums["tokens"]
        result: dict[str, Any] = {
            "router_load": [[round(value, 6) for value in layer] for layer in share.tolist()],
            "router_entropy_per_layer": [round(value, 6) for value in entropy.tolist()],
            "router_load_min": float(share.min()),
            "router_load_max": float(share.max()),
            "router_entropy": float(entropy.mean()),
        }
        if self._probe is not None:
            pairs = zip(self._route_probe(model), self._first, strict=True)
            changed = [float((now != first.to(now.device)).any(dim=-1).double().mean()) for now, first in pairs]
            result["router_changed"] = sum(changed) / len(changed)
            result["router_changed_per_layer"] = [round(value, 6) for value in changed]
        self.sums = {}
        return result

    @torch.no_grad()
    def _route_probe(self, model: BiEncoder) -> list[Tensor]:
        assert self._probe is not None
        was_training = model.training
        model.eval()
        probe = self._probe.to(next(model.parameters()).device)
        with record_routing(model.model) as tape:
            model.encode_alone(probe)
        model.train(was_training)
        # The order of tokens within a call is the engine's, the same every time for the same rows. The set of chosen
        # experts counts, not their order by weight.
        return [torch.cat([call.experts for call in calls]).sort(dim=-1).values for calls in tape.layers]

    def save(self, folder: Path) -> None:
        """Write the probe, its first routing and the sums since the last log line into a checkpoint folder."""
        if self._probe is None:
            return
        tensors = {
            "ids": self._probe.ids,
            "lengths": torch.tensor(self._probe.lengths),
            "padded_length": torch.tensor([self._probe.padded_length]),
            **{f"first.{layer}": experts for layer, experts in enumerate(self._first)},
            **self.sums,
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / PROBE_FILE)
        follow_umask(folder / PROBE_FILE)

    def load(self, folder: Path, device: torch.device) -> None:
        """Read back what ``save`` wrote; a checkpoint without it starts a new probe."""
        if not (folder / PROBE_FILE).is_file():
            return
        tensors = load_file(folder / PROBE_FILE)
        self._probe = TokenBatch(tensors["ids"], tensors["lengths"].tolist(), int(tensors["padded_length"]))
        self._first = [tensors[f"first.{layer}"] for layer in range(sum(name[:6] == "first." for name in tensors))]
        self.sums = {name: tensors[name].to(device) for name in ("load", "entropy") if name in tensors}
        self.sums |= {name: tensors[name] for name in ("tokens",) if name in tensors}
