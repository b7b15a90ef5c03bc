"""Options of ``python -m FlagEmbedding.merge``. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.evaluation.arguments import DevArguments
from FlagEmbedding.utils.cli import choice, option, positional, switch
from FlagEmbedding.utils.errors import UsageError

Method = Literal["linear", "slerp"]


@dataclass(frozen=True)
class MergeArguments:
    """Checkpoints."""

    models: list[str] = positional("the base, then what was trained from it: folders or hub ids", "MODEL")
    output_dir: str = option(help="the merged checkpoint")
    weights: list[float] = option([], "one for each model, their sum 1; default: the same for all", metavar="W")
    method: Method = choice(Method, "linear", "linear: weighted mean; slerp (two models): along the arc between them")
    sweep: list[float] = option(
        [], "shares of the tuned models to try on the dev collection, such as 0.25 0.5 0.75; the best one is written",
        metavar="SHARE",
    )  # fmt: skip
    overwrite: bool = switch(False, "replace a checkpoint that this command wrote to --output_dir")
    cache_dir: str | None = option(None, "where the hub's files are kept")

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise UsageError(complaint)

    def _complaints(self) -> list[str]:
        found, count = [], len(self.models)
        if count < 2:
            found.append("give two models or more: a base and what was trained from it")
        if self.weights and self.sweep:
            found.append("--sweep tries weights by itself: leave --weights out")
        if self.weights and len(self.weights) != count:
            found.append(f"--weights: {len(self.weights)} for {count} models; give one for each")
        if self.weights and not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
            found.append(f"--weights {' '.join(map(str, self.weights))}: their sum is {sum(self.weights):g}, not 1")
        if self.method == "slerp" and count != 2:
            found.append(f"--method slerp goes between two models, got {count}")
        if self.method == "slerp" and any(not 0 <= weight <= 1 for weight in (*self.weights, *self.sweep)):
            found.append("--method slerp goes between two models: give weights of 0 to 1")
        return found

    @property
    def shares(self) -> list[float]:
        """The weight of each model."""
        return self.weights or [1 / len(self.models)] * len(self.models)


@dataclass(frozen=True)
class MergeOptions:
    """Merging."""

    merge: MergeArguments
    dev: DevArguments

    def __post_init__(self) -> None:
        if self.merge.sweep and not self.dev.eval_data_dir:
            raise UsageError("--sweep needs a dev collection: give --eval_data_dir and --eval_languages")
