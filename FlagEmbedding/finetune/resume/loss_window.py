"""What stands between two log lines; part of every checkpoint, so that a resumed run logs what the whole one would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from FlagEmbedding.utils.distributed import gather_objects
from FlagEmbedding.utils.io import write_json_atomic

WINDOW_FILE = "loss_window.json"


class LossWindow:
    """What stands between two log lines: sums of the terms, and how many micro-batches in a row told nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self.zero_micro_batches = 0  # with a loss of exactly 0
        self.flat_micro_batches = 0  # with one score for all passages

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add one micro-batch's terms. A term that only some micro-batches have is averaged over those."""
        for name, value in terms.items():
            if name != "loss":  # the Trainer logs the sum itself
                self._sums[name] = self._sums.get(name, 0) + value.detach().double()
                self._counts[name] = self._counts.get(name, 0) + 1

    def saw(self, zero: bool, flat: bool = False) -> None:
        """Count micro-batches in a row whose loss was exactly 0, and whose scores were all the same."""
        self.zero_micro_batches = self.zero_micro_batches + 1 if zero else 0
        self.flat_micro_batches = self.flat_micro_batches + 1 if flat else 0

    def totals(self, accelerator: Accelerator) -> dict[str, tuple[float, int]]:
        """Sum and count of each term over all processes, which must call this together.

        Every process must hold the same names for the reduction, so the union is agreed on first.
        """
        found = {}
        for name in sorted(set().union(*gather_objects(sorted(self._sums)))):
            own = [float(self._sums.get(name, 0)), self._counts.get(name, 0)]
            pair = torch.tensor(own, dtype=torch.float64, device=accelerator.device)
            total, count = accelerator.reduce(pair, reduction="sum").tolist()
            found[name] = (total, int(count))
        return found

    def weigh(self, share: float) -> None:
        """Let what was added so far count ``share`` times: a step had another number of micro-batches then."""
        self._sums = {name: total * share for name, total in self._sums.items()}
        self._counts = {name: round(count * share) for name, count in self._counts.items()}

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last flush, over all processes; starts again from zero."""
        means = {name: total / count for name, (total, count) in self.totals(accelerator).items()}
        self._sums, self._counts = {}, {}
        return means

    def save(self, folder: Path, totals: dict[str, tuple[float, int]], **state: Any) -> None:
        """Write the ``totals`` of all processes and ``state`` into a checkpoint folder."""
        sums, counts = ({name: pair[part] for name, pair in totals.items()} for part in (0, 1))
        silent = {"zeros": self.zero_micro_batches, "flats": self.flat_micro_batches}
        write_json_atomic(folder / WINDOW_FILE, {**state, "sums": sums, "counts": counts, **silent})

    def load(self, folder: Path, device: torch.device, main: bool = True) -> dict[str, Any] | None:
        """Read back what ``save`` wrote and return ``state``; None where a checkpoint has no such file.

        The ``main`` process goes on with the totals of all, the others with none: at the next log line they are summed.
        """
        if not (folder / WINDOW_FILE).is_file():
            return None
        stored: dict[str, Any] = json.loads((folder / WINDOW_FILE).read_text(encoding="utf-8"))
        sums, counts = stored.pop("sums"), stored.pop("counts")
        self.zero_micro_batches, self.flat_micro_batches = stored.pop("zeros"), stored.pop("flats", 0)
        if main:
            self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in sums.items()}
            self._counts = counts
        return stored
