"""Names of retrieval modes: a part (``dense``, ``sparse``, ``colbert``, ``bm25``), or a sum of them.

A sum is made by weights (``dense+sparse``), by reciprocal ranks (``dense+sparse-rrf``) or by weights that were tuned on
train queries (``dense+sparse-tuned``). ``all`` stands for ``dense+sparse+colbert``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from FlagEmbedding.utils.errors import UsageError

Part = Literal["dense", "sparse", "colbert", "bm25"]
Fusion = Literal["weights", "rrf", "tuned"]
PARTS: tuple[Part, ...] = ("dense", "sparse", "colbert", "bm25")
HEADS: tuple[Part, ...] = ("sparse", "colbert")  # parts that need the heads of unified fine-tuning
_FUSIONS: tuple[Fusion, ...] = ("rrf", "tuned")


@dataclass(frozen=True)
class Mode:
    """One mode.

    Attributes:
        parts: in the order of ``PARTS``, each once.
        fusion: how several parts become one score.
    """

    parts: tuple[Part, ...]
    fusion: Fusion = "weights"

    @property
    def name(self) -> str:
        """As it is written, and as its folder of runs is called."""
        return "+".join(self.parts) + ("" if self.fusion == "weights" else f"-{self.fusion}")


DENSE = Mode(("dense",))


def parse_modes(given: Sequence[str], flag: str = "--modes") -> list[Mode]:
    """The modes that ``given`` names, each once. Raises ``UsageError`` for what is none."""
    return list(dict.fromkeys(_parse(text, flag) for text in given))


def parts_of(modes: Iterable[Mode]) -> list[Part]:
    """The parts that any of ``modes`` has, in the order of ``PARTS``."""
    there = {part for mode in modes for part in mode.parts}
    return [part for part in PARTS if part in there]


def _parse(text: str, flag: str) -> Mode:
    sums, _, ending = text.lower().partition("-")
    named = "dense+sparse+colbert" if sums == "all" else sums
    words = named.split("+")
    parts = tuple(part for part in PARTS if part in words)
    fusion: Fusion = next((each for each in _FUSIONS if each == ending), "weights")
    if len(parts) != len(words) or (ending and fusion == "weights"):
        raise UsageError(
            f"{flag} {text}: expected {', '.join(PARTS)}, a sum of them such as dense+sparse or all, and after it "
            "perhaps -rrf or -tuned"
        )
    if ending and len(parts) == 1:
        raise UsageError(f"{flag} {text}: -{ending} joins several modes, and {named} is one: leave it out")
    if "bm25" in parts and len(parts) > 1 and fusion == "weights":
        raise UsageError(f"{flag} {text}: BM25 has no published weight beside others: give {text}-rrf or {text}-tuned")
    return Mode(parts, fusion)
