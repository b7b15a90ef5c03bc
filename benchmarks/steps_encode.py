"""What each step of the encoder's engine brings by itself, on one thread.

    python benchmarks/steps_encode.py --fixture FIXTURE [--texts 320] [--repeats 3]

Every line adds one step to the line before: rows in file order padded to their batch, as a plain loop over a
dataloader would; sorted by token count; packed without padding; products by oneDNN with GELU and residual fused; the
compiled kernels; the last layer for first tokens alone; bf16. Processor seconds, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def variants(model: str) -> dict[str, Callable[[list[str]], Any]]:
    """Name of each step to a function that encodes texts."""
    import torch

    from FlagEmbedding.inference.arguments import EncoderArguments
    from FlagEmbedding.inference.text_encoder import TextEncoder
    from FlagEmbedding.modeling import kernels

    def encoder(all_rows: bool, **options: Any) -> TextEncoder:
        made = TextEncoder(EncoderArguments(encoder=model, pooling_method="cls", device="cpu", **options))
        made.encoder.all_rows = all_rows
        return made

    def call(made: TextEncoder, windows: int, onednn: bool = True, compiled: bool = True) -> Callable[[list[str]], Any]:
        def encode(texts: list[str]) -> Any:
            size = windows or len(texts)
            source = ((texts[i : i + size], None) for i in range(0, len(texts), size))
            with ExitStack() as without:
                if not onednn:
                    without.enter_context(torch.backends.mkldnn.flags(enabled=False))
                if not compiled:
                    without.enter_context(patch.object(kernels, "library", lambda: None))
                return torch.cat([found.dense for found, _ in made.encode(source, 512, batch_size=32)])

        return encode

    padded, packed = encoder(True, engine="padded"), encoder(True)
    return {
        "padded, file order, 32 rows": call(padded, 32),
        "padded, sorted": call(padded, 0),
        "packed": call(packed, 0, onednn=False, compiled=False),
        "+ oneDNN, fused": call(packed, 0, compiled=False),
        "+ compiled kernels": call(packed, 0),
        "+ last layer for first tokens": call(encoder(False), 0),
        "+ bf16": call(encoder(False, dtype="bf16"), 0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixture", type=Path, required=True, help="folder made by fixture.py")
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    import torch
    from floor import compare_with_floor
    from time_encode import read
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    texts = read(arguments.fixture / "texts_mixed.jsonl", arguments.texts)
    ways = variants(str(arguments.fixture / "dense"))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors = {name: way(texts) for name, way in ways.items()}  # also warms up
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way(texts)
            seconds[name].append(time.process_time() - start)
    first = next(iter(vectors))
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.fixture / "dense"))
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=512)["input_ids"]))
    print("| step | seconds | tokens/s | of the fp32 floor | greatest difference |")
    print("|---|---|---|---|---|")
    for name in ways:
        taken = statistics.median(seconds[name])
        floor = compare_with_floor(
            arguments.fixture / "dense", tokens, torch.float32, "cpu", backward=False, wall=taken, busy=taken
        )
        difference = float((vectors[name].float() - vectors[first].float()).abs().max())
        print(f"| {name} | {taken:.2f} | {tokens / taken:,.0f} | {floor['of_floor']:.2f} | {difference:.0e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
