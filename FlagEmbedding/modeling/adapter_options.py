"""LoRA's options. Imports no torch, so that a command can parse them before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError

LoraSave = Literal["merged", "adapter"]
PARTS = ("attention", "ffn", "all")


@dataclass(frozen=True)
class LoraOptions:
    """LoRA; small adapters train in the place of the weights.

    Raises:
        UsageError: values that cannot be, or that have no effect without ``--lora_r``.
    """

    lora_r: int = option(0, "Rank of the adapters; 0: none, the weights themselves train.")
    lora_alpha: int | None = option(None, "An adapter counts lora_alpha / lora_r times; default: twice the rank.")
    lora_dropout: float = option(0.0, "Dropout before an adapter.")
    lora_target: list[str] = option(
        ["all"],
        "Linear layers that get one: attention, ffn (each expert's too), all, or parts of module names (query value).",
    )
    use_dora: bool = switch(False, "DoRA: a trained length for each row of a weight, beside its direction.")
    use_rslora: bool = switch(False, "Scale by lora_alpha / sqrt(lora_r), for large ranks.")
    lora_save: LoraSave = choice(
        LoraSave,
        "merged",
        "merged: a whole checkpoint that loads everywhere, the adapter in its folder adapter/; adapter: PEFT's files "
        "alone, which name the base.",
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise UsageError(f"--lora_r must be 0 (no adapters) or more, got {self.lora_r}")
        defaults = {each.name: each.default for each in fields(self)} | {"lora_target": ["all"]}
        for name, value in vars(self).items():
            if not self.lora_r and value != defaults[name]:
                raise UsageError(f"--{name} has no effect without --lora_r")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UsageError(f"--lora_alpha must be at least 1, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout is a chance in [0, 1), got {self.lora_dropout}")
        if not self.lora_target or any(not target.strip(".") for target in self.lora_target):
            raise UsageError(f"--lora_target: expected {', '.join(PARTS)} or parts of module names")
        if self.lora_save not in get_args(LoraSave):
            raise UsageError(f"--lora_save must be merged or adapter, got {self.lora_save!r}")

    @property
    def alpha(self) -> int:
        """``lora_alpha``, or twice the rank."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
