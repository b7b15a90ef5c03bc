"""``--plan``: what a run will do and cost, from its own data, model and Trainer; nothing is written or kept.

Everything is built as the run builds it, so what cannot work is refused in the run's own words. Three steps on the
run's first batches say what a step costs; they train a model that is then thrown away. What the run would write goes to
a temporary folder, and so do prepared rows that the cache does not hold yet.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from FlagEmbedding.finetune.arguments import Arguments
from FlagEmbedding.finetune.data.counts import Counts, count
from FlagEmbedding.finetune.data.store import cache_folder
from FlagEmbedding.finetune.probe import Cost, ProbeTrainer, left_out
from FlagEmbedding.finetune.report.sampled import Sampled, sample
from FlagEmbedding.finetune.report.settings import block, planned_steps, settings_lines
from FlagEmbedding.finetune.resume.checkpoints import would_begin
from FlagEmbedding.finetune.resume.runs import step_of
from FlagEmbedding.finetune.runner import build, ready
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.heartbeat import watched
from FlagEmbedding.utils.processes import on_main

_FLAGS = {"query": "query_max_len", "passage": "passage_max_len", "neg_q": "passage_max_len"}
_ROLES = {"query": "queries", "passage": "passages", "neg_q": "queries of negatives"}


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        arguments: of the run.
        lines: what the run says of itself at its start, by name.
        steps, done: optimizer steps of the whole run, and those that a checkpoint has behind it.
        epochs: how often each row is drawn.
        counts: what the micro-batches hold.
        negatives: passages in the softmax beside a query's positive, in the smallest and the largest batch.
        router: how experts are chosen and what the router learns by; empty for a dense model.
        base: sampled rows under the base.
        cost: of a step.
    """

    arguments: Arguments
    lines: dict[str, str]
    steps: int
    done: int
    epochs: float
    counts: Counts
    negatives: tuple[int, int]
    router: str
    base: Sampled
    cost: Cost

    @property
    def tokens(self) -> int:
        """That the whole run encodes, in all processes; what is encoded twice (``--grad_cache``) counts once."""
        return self.counts.tokens

    def text(self) -> str:
        """The block that is printed."""
        lines = {**self.lines, "epochs": f"{self.epochs:.2f}", "tokens in all": self._tokens()}
        lines |= {"negatives": self._negatives(), "padding": self._padding(), "cut": self._cut()}
        lines |= {"router": self.router} if self.router else {}
        lines |= {"memory": self._memory(), "margins": margins_text(self.base), "time": self._time()}
        return f"{block('the run would be', lines)}\nNothing was trained or written: leave --plan out to start it."

    def _tokens(self) -> str:
        looked_at = f"estimated from {self.counts.looked_at:,} of {self.counts.every:,} batches"
        how = "counted" if self.counts.counted else looked_at
        how += ", with the negatives of now" * bool(self.arguments.refresh.refresh_negatives_every_n_epochs)
        return f"{self.tokens:,}, {round(self.tokens / self.steps):,} per step ({how})"

    def _negatives(self) -> str:
        fewest, most = self.negatives
        own = self.arguments.data.train_group_size - 1
        many = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        where = "all processes" if self.arguments.objective.negatives_cross_device and world_size() > 1 else "the batch"
        text = f"{many} in the softmax per query: {own} of its own row, the others of other queries in {where}"
        return f"{text}; those that the mask finds are left out" if self.arguments.objective.masks else text

    def _padding(self) -> str:
        packed = self.arguments.engine.engine == "packed"
        what = "not computed (--engine packed)" if packed else "computed too (--engine padded)"
        return f"{self.counts.padding:.1%} of a batch that is padded to its longest texts; {what}"

    def _cut(self) -> str:
        return ", ".join(
            f"{own.cut / own.texts:.1%} of the {_ROLES[role]} (--{_FLAGS[role]} {own.limit})"
            for role, own in self.counts.roles.items()
        )

    def _memory(self) -> str:
        cost = self.cost
        parts = f"weights {_size(cost.weights)}, gradients {_size(cost.gradients)}, optimizer {_size(cost.optimizer)}"
        parts += f", averaged weights and guide {_size(cost.beside)}" if cost.beside else ""
        text = f"{_size(cost.memory)}: {parts}, activations of one micro-batch {_size(cost.activations)}"
        return text if cost.peak is None else f"{text}; at most {_size(cost.peak)} of the device was in use"

    def _time(self) -> str:
        left = self.steps - self.done
        whole = timedelta(seconds=round(left * self.cost.seconds))
        text = f"{whole} for {left:,} steps of {self.cost.seconds:.2f} s"
        return f"{text}, and the evaluations beside them" if self.arguments.evaluation.on else text


@watched("Nothing was written: give the same command again")
def plan(arguments: Arguments) -> Plan:
    """What a run with ``arguments`` will do. Raises ``UserError`` where it cannot work, as the run would."""
    candidates = ready(arguments)
    with _elsewhere(arguments) as shadow:
        trainer = build(shadow, ProbeTrainer)
        _leave_out_refresh(trainer, arguments)
        resumed = on_main(lambda: would_begin(candidates, trainer.fingerprint, arguments.training))
        training, model = arguments.training, trainer.bare_model
        steps, per_epoch = planned_steps(trainer, training)
        per_step = training.world_size * training.gradient_accumulation_steps
        with_neg_q = arguments.objective.encodes_neg_q(arguments.objective.penalty_weight)
        counts = count(trainer.batch_sampler, model.tokenizer, per_step, steps, with_neg_q)
        sharing = world_size() if arguments.objective.negatives_cross_device else 1
        fewest, most = (sharing * size * arguments.data.train_group_size - 1 for size in counts.queries)
        return Plan(
            arguments=arguments,
            lines=settings_lines(trainer, arguments),
            steps=steps,
            done=0 if resumed is None else step_of(resumed),
            epochs=steps / per_epoch,
            counts=counts,
            negatives=(fewest, most),
            router=_router(arguments, trainer),
            base=sample(model, trainer.batch_sampler, trainer.data_collator),  # type: ignore[arg-type]
            cost=trainer.cost(),
        )


def _leave_out_refresh(trainer: ProbeTrainer, arguments: Arguments) -> None:
    """It was made, and so checked; but an epoch that ends within the probe would mine."""
    if arguments.refresh.refresh_negatives_every_n_epochs:
        from FlagEmbedding.finetune.refresh import RefreshNegatives

        trainer.remove_callback(RefreshNegatives)


def margins_text(found: Sampled) -> str:
    """The margins of sampled rows in one line."""
    if not found.margins.size:
        return "none: a row has no negative of its own (--train_group_size 1)"
    low, middle, high = np.quantile(found.hardest, (0.1, 0.5, 0.9))
    above = float((found.hardest < 0).mean())
    return (
        f"positive over its hardest negative under the base, {len(found.hardest)} rows: median {middle:+.3f}, "
        f"80 % from {low:+.3f} to {high:+.3f}; {above:.0%} of the rows have a negative above the positive"
    )


@contextmanager
def _elsewhere(arguments: Arguments) -> Iterator[Arguments]:
    """``arguments`` for the probe, whose output and newly prepared rows lie in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="flagembedding-plan-", ignore_cleanup_errors=True) as name:
        folder, training = Path(name), copy.copy(arguments.training)
        training.output_dir = str(folder / "output")
        left_out(training)
        prepared = cache_folder(str(folder))
        prepared.mkdir()
        for counts in cache_folder(arguments.data.cache_path).glob("*.json"):
            for known in (counts, counts.with_suffix(".arrow")):
                (prepared / known.name).symlink_to(known.resolve())
        yield replace(arguments, training=training, data=replace(arguments.data, cache_path=str(folder)))


def _router(arguments: Arguments, trainer: ProbeTrainer) -> str:
    """How tokens come to experts, and what the router learns by."""
    model, experts, objective = trainer.bare_model, arguments.experts, arguments.objective
    if not model.has_experts:
        return ""
    said = model.model.config
    learns = [f"--router_gradient {experts.router_gradient}"] if experts.router_gradient != "none" else []
    losses = {name: getattr(objective, name) for name in ("router_aux_loss_coef", "router_z_loss_coef")}
    learns += [f"--{name} {value:g}" for name, value in losses.items() if value]
    if said.num_experts_per_tok > 1:
        learns.append("the weights of its choice")
    how = f"learns by {' and '.join(learns)}" if learns else "gets no gradient (--router_gradient none), as published"
    how = how if model.router == "learned" else "goes by token ids, and learns nothing (--router hash)"
    return f"{said.num_experts} experts in {said.moe}, {said.num_experts_per_tok} per token; it {how}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
