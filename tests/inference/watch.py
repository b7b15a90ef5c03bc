"""What models did while they encoded."""

from __future__ import annotations

import multiprocessing
from functools import partial
from typing import Any

import torch

TEXTS = ["강", "The Han river runs through Seoul and reaches the Yellow Sea.", "", "one TWO three", "river " * 9]


class Watch:
    """What models did since: tokens of each slab, which of the models worked, forwards of the padded engine."""

    def __init__(self, *encoders: torch.nn.Module) -> None:
        self.slabs: list[int] = []
        self.workers: set[int] = set()
        self.padded = 0
        for number, encoder in enumerate(encoders):
            encoder.model.embeddings.word_embeddings.register_forward_hook(partial(self._slab, number))
            encoder.model.register_forward_pre_hook(self._whole)

    def _slab(self, number: int, _: Any, ids: Any, __: Any) -> None:
        self.slabs.append(ids[0].numel())
        self.workers.add(number)

    def _whole(self, *_: Any) -> None:
        self.padded += 1

    def seen(self) -> dict[str, Any]:
        children = [child.name.partition("-")[0] for child in multiprocessing.active_children()]
        return {"slabs": sorted(self.slabs), "workers": self.workers, "padded": self.padded, "processes": len(children)}
