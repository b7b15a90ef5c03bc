"""What happened in a run, for the person who started it: losses by term, router load, where the checkpoint lies."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from signal import Signals
from typing import Any

from tabulate import tabulate

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.report.usage import Usage

TERMS = {
    "loss": "loss (what is minimized)",
    "contrastive_loss": "contrastive loss",
    "penalty": "penalty: mean 1 − cos(negative, its own query)",
    "pair_rows": "contrastive loss of the (neg_q, negative) rows",
    "masked_twins": "twins of positives left out, per batch",
    "masked_by_margin": "passages left out by the margin, per batch",
    "router_aux_loss": "router load balance loss",
    "router_z_loss": "router z-loss",
}
_NOT_TERMS = {"epoch", "step", "grad_norm", "learning_rate"}
_NOT_TERMS |= {"router_load_min", "router_load_max", "router_entropy", "router_changed"}


def term_names(line: dict[str, Any]) -> list[str]:
    """The loss terms of a log line, the known ones first."""
    names = [name for name in TERMS if name in line]
    return names + [n for n, v in line.items() if n not in TERMS and n not in _NOT_TERMS and not isinstance(v, list)]


@dataclass
class TrainingSummary:
    """The outcome of one ``run.py``.

    Attributes:
        arguments: what was asked for.
        model: what was trained.
        history: the Trainer's log lines.
        seconds, steps: duration of this call and optimizer steps of the whole run.
        tokens: encoded in the whole run, by all processes.
        signal: the number of the signal that ended it before its last step; 0: none.
    """

    arguments: Arguments
    model: BiEncoder
    history: list[dict[str, Any]]
    seconds: float
    steps: int
    tokens: int = 0
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0, or as a shell says it of what a signal ended."""
        return 128 + self.signal if self.signal else 0

    def show(self) -> None:
        """Print the summary (entry points only)."""
        if self.signal:
            print(self.stopped(), file=sys.stderr)
            return
        lines = [line for line in self.history if "loss" in line]
        if lines:
            print(_loss_table(lines[0], lines[-1]))
        routed = [line for line in lines if "router_load" in line]
        if routed:
            print(_router_table(routed[-1]))
        folder = self.arguments.training.output_dir
        print(f"\n{self.steps} steps in {self.seconds:.1f} s. Checkpoint: {folder}\n{self.usage().printed()}")

    def stopped(self) -> str:
        """Where a run ended that a signal ended, and how it goes on."""
        checkpoint = f"{self.arguments.training.output_dir}/checkpoint-{self.steps}"
        line = f"stopped by {Signals(self.signal).name} after step {self.steps}: {checkpoint} is written; "
        if self.arguments.training.save_only_model:
            return f"{line}it cannot be gone on from, as --save_only_model leaves out the optimizer's state"
        return f"{line}the same command with --resume_from_checkpoint True goes on from there"

    def kept_step(self, best_step: int | None) -> int:
        """The step whose weights the run left.

        Args:
            best_step: of the best evaluation, where there was one.
        """
        loaded = self.arguments.training.load_best_model_at_end and best_step is not None
        return best_step if loaded and best_step is not None else self.steps

    def usage(self, place: str | None = None) -> Usage:
        """How to use the checkpoint.

        Args:
            place: where it is; None: in ``--output_dir``.
        """
        return Usage(place or str(self.arguments.training.output_dir), self.model)


def _loss_table(first: dict[str, Any], last: dict[str, Any]) -> str:
    rows = [
        [TERMS.get(n, n.replace("_", " ")), *(f"{line[n]:.4f}" if n in line else "" for line in (first, last))]
        for n in term_names(last)
    ]
    return _table("Losses", ["term", f"step {first['step']}", f"step {last['step']}"], rows)


def _router_table(line: dict[str, Any]) -> str:
    loads = line["router_load"]
    changed = line.get("router_changed_per_layer", [None] * len(loads))
    rows = [
        [layer, *(f"{share:.1%}" for share in load), f"{entropy:.3f}", "" if moved is None else f"{moved:.1%}"]
        for layer, (load, entropy, moved) in enumerate(
            zip(loads, line["router_entropy_per_layer"], changed, strict=True)
        )
    ]
    experts = [f"expert {expert}" for expert in range(len(loads[0]))]
    header = ["layer", *experts, "entropy", "tokens that changed expert"]
    return "\n" + _table(f"Routers at step {line['step']}", header, rows)


def _table(title: str, header: list[str], rows: list[list[Any]]) -> str:
    align = ["left" if header[0] == "term" else "right", *["right"] * (len(header) - 1)]
    return f"{title}\n{tabulate(rows, header, tablefmt='simple', colalign=align, disable_numparse=True)}"
