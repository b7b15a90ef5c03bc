"""What happened in a run, for the person who started it: losses by term, router load, where the checkpoint lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from FlagEmbedding.finetune.arguments import ModelArguments

_TERMS = {
    "loss": "loss (what is minimised)",
    "contrastive_loss": "contrastive loss",
    "penalty": "penalty: mean 1 − cos(negative, its own query)",
    "router_aux_loss": "router load balance loss",
    "router_z_loss": "router z-loss",
}
_NOT_TERMS = {
    "epoch",
    "step",
    "grad_norm",
    "learning_rate",
    "router_load_min",
    "router_load_max",
    "router_entropy",
    "router_changed",
}


@dataclass
class TrainingSummary:
    """The outcome of one ``run.py``.

    Attributes:
        output_dir: the final checkpoint.
        history: the Trainer's log lines.
        seconds, steps: duration of this call and optimiser steps of the whole run.
        model: how the checkpoint is to be used.
        remote_code: it has experts, which other libraries need trust for.
    """

    output_dir: Path
    history: list[dict[str, Any]]
    seconds: float
    steps: int
    model: ModelArguments
    remote_code: bool

    def show(self, console: Console | None = None) -> None:
        """Print the summary (entry points only)."""
        console = console or Console()
        lines = [line for line in self.history if "loss" in line]
        if lines:
            console.print(_loss_table(lines[0], lines[-1]))
        routed = [line for line in lines if "router_load" in line]
        if routed:
            console.print(_router_table(routed[-1]))
        remote = ", trust_remote_code=True" if self.remote_code else ""
        console.print(f"\n{self.steps} steps in {self.seconds:.1f} s. Checkpoint: [bold]{self.output_dir}[/bold]")
        console.print("Use it:", style="bold")
        console.print(
            f"  from FlagEmbedding import FlagModel\n"
            f"  model = FlagModel({str(self.output_dir)!r}, pooling_method={self.model.sentence_pooling_method!r}, "
            f"normalize_embeddings={self.model.normalize_embeddings})\n"
            f"  model.encode_queries(['…']) @ model.encode_corpus(['…', '…']).T\n"
            f"or\n"
            f"  SentenceTransformer({str(self.output_dir)!r}{remote})",
            markup=False,
            highlight=False,
        )


def _loss_table(first: dict[str, Any], last: dict[str, Any]) -> Table:
    table = Table(title="Losses", title_justify="left")
    table.add_column("term")
    table.add_column(f"step {first['step']}", justify="right")
    table.add_column(f"step {last['step']}", justify="right")
    names = [name for name in _TERMS if name in last]
    names += [n for n, v in last.items() if n not in _TERMS and n not in _NOT_TERMS and not isinstance(v, list)]
    for name in names:
        table.add_row(_TERMS.get(name, name.replace("_", " ")), _number(first.get(name)), _number(last.get(name)))
    return table


def _router_table(line: dict[str, Any]) -> Table:
    table = Table(title=f"Routers at step {line['step']}", title_justify="left")
    table.add_column("layer", justify="right")
    experts = len(line["router_load"][0])
    for expert in range(experts):
        table.add_column(f"expert {expert}", justify="right")
    table.add_column("entropy", justify="right")
    table.add_column("tokens that changed expert", justify="right")
    changed = line.get("router_changed_per_layer", [None] * len(line["router_load"]))
    rows = zip(line["router_load"], line["router_entropy_per_layer"], changed, strict=True)
    for layer, (load, entropy, moved) in enumerate(rows):
        shares = [f"{share:.1%}" for share in load]
        table.add_row(str(layer), *shares, f"{entropy:.3f}", "" if moved is None else f"{moved:.1%}")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
