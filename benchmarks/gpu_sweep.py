"""Encoding and training on one device by slab size: tokens per second, share of the measured peak, memory, waits.

    python benchmarks/gpu_sweep.py --fixture FIXTURE [--device cuda:0] [--quick]

The peak is that of a square matrix product in the same precision, measured first; the share counts the operations of
the encoder's linear layers alone (``floor.py``). Prints Markdown tables; what does not fit the memory is a line that
says so. ``--device cpu --quick`` shows that the script runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from floor import operations  # noqa: E402

from FlagEmbedding.finetune.parsing import parse_arguments  # noqa: E402
from FlagEmbedding.finetune.runner import build_trainer  # noqa: E402
from FlagEmbedding.inference.arguments import EncoderArguments  # noqa: E402
from FlagEmbedding.inference.text_encoder import TextEncoder  # noqa: E402
from FlagEmbedding.modeling.tokens import TokenBatch  # noqa: E402

LENGTHS = (64, 512)  # tokens of short and long texts
ENCODE_SLABS = (16_384, 32_768, 65_536, 131_072)
TRAIN_SLABS = (2_048, 8_192, 32_768)
TRAIN_WAYS = {
    "all weights": ("dense", ()),
    "only intermediate": ("dense", ("--only_train", "intermediate")),
    "2 experts, only intermediate": ("moe", ("--only_train", "intermediate")),
    "gradient caching": ("dense", ("--grad_cache", "True")),
}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str, times: int) -> float:
    """Seconds of one call, the mean of ``times`` after two for warming up."""
    for _ in range(2):
        call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times


def peak(device: str, quick: bool) -> float:
    """Operations per second of a square bfloat16 product."""
    side = 512 if quick else 8192
    x = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / seconds(lambda: x @ x, device, 10)


@contextmanager
def counted_waits(device: str) -> Iterator[list[str]]:
    """What made the host wait for the device meanwhile, as torch warns of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("warn")
        found: list[str] = []
        try:
            yield found
        finally:
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("default")
            found += [str(each.message) for each in caught if "synchroniz" in str(each.message)]


def memory(device: str) -> str:
    """Greatest memory since the last call, in GB."""
    if device == "cpu":
        return ""
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"{most:.1f}"


def figures(call: Callable[[], Any], tokens: int, work: int, device: str, times: int, best: float) -> str:
    """Cells of a line: tokens per second, share of the peak, GB, waits of one more call."""
    try:
        memory(device)  # forget the greatest so far
        took = seconds(call, device, times)
        with counted_waits(device) as waits:
            call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory | | |"
    return f"{tokens / took:,.0f} | {work / took / best:.0%} | {memory(device)} | {len(waits)} |"


def encoding(fixture: Path, device: str, quick: bool, best: float) -> Iterator[str]:
    """Lines of the table: short and long texts, by slab."""
    for model in ("dense", "moe"):
        options = EncoderArguments(encoder=str(fixture / model), dtype="fp32" if quick else "bf16", device=device)  # type: ignore[arg-type]
        encoder = TextEncoder(options)
        words: int = encoder.encoder.model.config.vocab_size  # type: ignore[assignment]
        for length in (min(each, encoder.longest or each) for each in LENGTHS):
            count = 4 if quick else 262_144 // length
            ids = torch.randint(min(10, words - 1), min(1000, words), (count * length,), device=device)
            batch = TokenBatch(ids, [length] * count, length)
            for slab in ENCODE_SLABS[:1] if quick else ENCODE_SLABS:

                def encode(encoder: TextEncoder = encoder, batch: TokenBatch = batch, slab: int = slab) -> Any:
                    encoder.encoder.slab_limit = None  # what an earlier line found to be too much
                    return encoder.represent(batch, ("dense",), slab)

                work = operations(fixture / model, len(ids), backward=False)
                cells = figures(encode, len(ids), work, device, 1 if quick else 5, best)
                limit = encoder.encoder.slab_limit
                yield f"| {model} | {length} | {slab}{f' (halved to {limit})' if limit else ''} | {cells}"


def training_words(fixture: Path, model: str, out: str, slab: int, device: str, quick: bool) -> list[str]:
    """Words of run.py for one line of the training table."""
    options = {
        "model_name_or_path": fixture / model, "train_data": fixture / "train", "output_dir": f"{out}/run",
        "cache_path": f"{out}/rows", "temperature": 0.02, "bf16": not quick, "train_group_size": 8,
        "per_device_train_batch_size": 2 if quick else 32, "passage_max_len": 512, "slab_tokens": slab,
        "use_cpu": device == "cpu",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def training(fixture: Path, device: str, quick: bool, best: float) -> Iterator[str]:
    """Lines of the table: one micro-step by slab and by what trains."""
    for way, (folder, words) in TRAIN_WAYS.items():
        for slab in TRAIN_SLABS[:1] if quick else TRAIN_SLABS:
            with tempfile.TemporaryDirectory() as out:
                arguments = parse_arguments([*training_words(fixture, folder, out, slab, device, quick), *words])
                trainer = build_trainer(arguments)
                model = trainer.bare_model.to(device).train()
                batch = next(iter(trainer.get_train_dataloader()))
                batch.pop("rows", None)
                cells = step_figures(model, batch, fixture / folder, device, quick, best)
            yield f"| {way} | {slab} | {cells}"


def step_figures(model: Any, batch: dict[str, Any], folder: Path, device: str, quick: bool, best: float) -> str:
    """Cells of a line of the training table: forward and backward of one batch."""

    def step() -> None:
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=not quick):
            output = model(**batch)
        output.loss.backward()
        model.zero_grad(set_to_none=True)

    tokens = sum(len(each.ids) for each in batch.values() if isinstance(each, TokenBatch))
    return figures(step, tokens, operations(folder, tokens, backward=True), device, 1 if quick else 5, best)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixture", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    arguments = parser.parse_args()
    best = peak(arguments.device, arguments.quick)
    print(f"\nPeak of a bfloat16 product: {best / 1e12:.1f} TFLOP/s; torch {torch.__version__}\n")
    print("| encode | tokens a text | slab | tokens/s | of the peak | GB | waits |\n|---|---|---|---|---|---|---|")
    for line in encoding(arguments.fixture, arguments.device, arguments.quick, best):
        print(line, flush=True)
    print("\n| train | slab | tokens/s | of the peak | GB | waits |\n|---|---|---|---|---|---|")
    for line in training(arguments.fixture, arguments.device, arguments.quick, best):
        print(line, flush=True)


if __name__ == "__main__":
    main()
