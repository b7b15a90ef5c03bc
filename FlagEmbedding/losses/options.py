"""Options of the objective beyond the published ones, by what they act on; ``ObjectiveArguments`` has them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from FlagEmbedding.utils.cli import choice, option, switch
from FlagEmbedding.utils.errors import UsageError

MarginStrategy = Literal["absolute", "relative"]
DistillLoss = Literal["published", "kl"]
NegQControl = Literal["none", "unused", "permuted", "positive"]


@dataclass(frozen=True)
class FalseNegativeOptions:
    """Which passages of a batch are no negatives of a query (see ``losses.false_negatives``)."""

    mask_twins: bool = switch(
        False,
        "Passages with the text of one of the query's positives are not its negatives; False: they are, as published "
        "(a line says so where they occur).",
    )
    false_negative_margin: float | None = option(
        None,
        "Nor are passages whose cosine with the query is above its positive's less this margin; below 0: above it by "
        "more than that. Default: no such mask.",
    )
    margin_strategy: MarginStrategy = choice(
        MarginStrategy, "absolute", "relative: the margin is a share of the positive's cosine."
    )
    guide_model: str | None = option(
        None, "The checkpoint whose cosines decide; it is not trained. Default: the model itself, as it is."
    )

    def margin_complaints(self) -> list[str]:
        """What contradicts itself here, a line each."""
        found = []
        if self.margin_strategy not in get_args(MarginStrategy):
            found.append(f"--margin_strategy must be absolute or relative, got {self.margin_strategy!r}")
        if self.false_negative_margin is not None and not -2 <= self.false_negative_margin <= 2:
            found.append(
                f"--false_negative_margin is a difference of cosines, from -2 to 2, got {self.false_negative_margin}"
            )
        if self.false_negative_margin is None:
            given = {"guide_model": self.guide_model, "margin_strategy": self.margin_strategy}
            found += [
                f"--{name} has no effect without --false_negative_margin"
                for name, value in given.items()
                if value not in (None, "absolute")
            ]
        return found

    @property
    def masks(self) -> bool:
        """True where passages may be left out of the softmax."""
        return self.mask_twins or self.false_negative_margin is not None


@dataclass(frozen=True)
class DistillationOptions:
    """How a teacher's scores become targets, and how they are learned."""

    distill_temperature: float = option(
        1.0, "The teacher's scores are divided by this before their softmax (0.05: scores in 0 to 1 become sharp)."
    )
    distill_loss: DistillLoss = choice(
        DistillLoss,
        "published",
        "published: each passage of the group against all of the batch, as strongly as the teacher likes it; kl: "
        "KL(teacher || student) over the group alone.",
    )

    def distillation_complaints(self) -> list[str]:
        """What contradicts itself here, a line each."""
        found = []
        if self.distill_temperature <= 0:
            found.append(f"--distill_temperature must be above 0, got {self.distill_temperature}")
        if self.distill_loss not in get_args(DistillLoss):
            found.append(f"--distill_loss must be published or kl, got {self.distill_loss!r}")
        return found


@dataclass(frozen=True)
class ControlOptions:
    """Controls that tell what the penalty itself does from what its additional texts do."""

    neg_q_control: NegQControl = choice(
        NegQControl,
        "none",
        "A control in the penalty's place, at equal tokens. unused: neg_q is encoded and counts for nothing; permuted: "
        "each negative is pulled to another one's neg_q; positive: each query's positive is pulled to the query.",
    )
    neg_q_as_rows: bool = switch(
        False, "Each (neg_q, negative) pair is a row of the contrastive loss (alone: with --penalty_weight 0)."
    )

    def control_complaints(self, penalty_weight: float) -> list[str]:
        """What contradicts itself here, a line each."""
        found, control = [], self.neg_q_control
        if control not in get_args(NegQControl):
            found.append(f"--neg_q_control must be none, unused, permuted or positive, got {control!r}")
        if control in ("permuted", "positive") and penalty_weight == 0:
            found.append(f"--neg_q_control {control} has no effect with --penalty_weight 0: give the penalty a weight")
        if self.neg_q_as_rows and control != "none":
            found.append(f"--neg_q_as_rows and --neg_q_control {control} use neg_q in two ways: give one of them")
        return found

    def encodes_neg_q(self, penalty_weight: float) -> bool:
        """Whether the negatives' own queries take part in a step."""
        return penalty_weight > 0 or self.neg_q_control == "unused" or self.neg_q_as_rows


def refuse(complaints: list[str]) -> None:
    """Raise the first as ``UsageError``."""
    for complaint in complaints:
        raise UsageError(complaint)
