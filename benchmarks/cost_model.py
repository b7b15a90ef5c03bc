"""What embedding a corpus costs: hours and bytes by passages and devices, out of rates measured on this machine.

    python benchmarks/cost_model.py --encoder MODEL --corpus data/sample/miracl-corpus-v1.0-ko/*.gz
    python benchmarks/cost_model.py --encoder MODEL --corpus … --tokens_per_second 150000   # of one of your GPUs

Measured: tokens of a passage; tokens a second of one encoder; passages a second that the survey reads, checks and
hashes (one process); bytes a second that joining shards writes, with their checksums. The model:

    survey  = passages / survey rate                       once, by the first worker; the others wait
    encode  = passages * tokens / (tokens per second * devices) + one shard (the last worker's)
    join    = passages * dimension * 4 bytes / join rate   once, by --finish
    disk    = 2 * passages * dimension * 4 bytes           shards and index, until they are joined
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from FlagEmbedding.collections.corpus import read_file, survey
from FlagEmbedding.inference.arguments import WINDOW, EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.inference.tokenization import tokenize
from FlagEmbedding.retrieval.index import assemble_index
from FlagEmbedding.retrieval.shards import ShardStore


def measure(encoder: TextEncoder, files: list[Path], passages: int, length: int) -> dict[str, float]:
    """Rates of one process on this machine."""
    texts = [passage.text for path in files for passage in read_file(path)][:passages]
    rows = tokenize(encoder.tokenizer, texts, encoder.max_length(length))
    windows = [(texts[i : i + WINDOW], None) for i in range(0, len(texts), WINDOW)]
    started = time.perf_counter()
    for found, _ in encoder.encode(iter(windows), encoder.max_length(length)):
        assert found.dense is not None
        found.dense.float().cpu()
    encoding = time.perf_counter() - started
    started = time.perf_counter()
    total = survey(files).total
    surveying = time.perf_counter() - started
    return {
        "tokens_per_passage": sum(rows.lengths) / len(texts),
        "tokens_per_second": sum(rows.lengths) / encoding,
        "survey_passages_per_second": total / surveying,
        "join_bytes_per_second": join_rate(encoder.hidden_size),
    }


def join_rate(dimension: int, shards: int = 24) -> float:
    """Bytes a second of :func:`assemble_index`."""
    with tempfile.TemporaryDirectory() as place:
        store = ShardStore.create(Path(place) / "shards", {}, shards * WINDOW, dimension, WINDOW)
        vectors = np.random.default_rng(0).normal(size=(WINDOW, dimension)).astype("<f4")
        for shard in range(shards):
            store.write(shard, vectors, [f"{shard}-{row}" for row in range(WINDOW)])
        started = time.perf_counter()
        assemble_index(store, Path(place))
        return shards * vectors.nbytes / (time.perf_counter() - started)


def cost(rates: dict[str, float], passages: float, devices: int, dimension: int) -> dict[str, float]:
    """Hours and bytes by the model above."""
    tokens, speed = rates["tokens_per_passage"], rates["tokens_per_second"]
    size = 4 * passages * dimension
    parts = {
        "survey": passages / rates["survey_passages_per_second"],
        "encode": passages * tokens / (speed * devices) + WINDOW * tokens / speed,
        "join": size / rates["join_bytes_per_second"],
    }
    hours = {name: seconds / 3600 for name, seconds in parts.items()}
    return {**hours, "hours": sum(hours.values()), "device hours": devices * hours["encode"], "disk": 2 * size}


def main() -> None:
    """Measure, then print the rates and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="files in MIRACL's form")
    parser.add_argument("--measure", type=int, default=2_048, help="passages of it that are encoded")
    parser.add_argument("--max_passage_length", type=int, default=512)
    parser.add_argument("--passages", type=float, nargs="+", default=[1e6, 1e8, 1e9])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dimension", type=int, default=1_024, help="of the vectors in the table")
    parser.add_argument("--tokens_per_second", type=float, help="of one device, measured elsewhere")
    parser.add_argument("--tokens_per_passage", type=float, help="of another corpus")
    given = parser.parse_args()
    encoder = TextEncoder(EncoderArguments(encoder=given.encoder))
    rates = measure(encoder, given.corpus, given.measure, given.max_passage_length)
    print(tabulate([(k.replace("_", " "), f"{v:,.0f}") for k, v in rates.items()], ["measured", ""], tablefmt="pipe"))
    rates |= {k: v for k in ("tokens_per_second", "tokens_per_passage") if (v := getattr(given, k)) is not None}
    rows = []
    for passages in given.passages:
        for devices in given.devices:
            found = cost(rates, passages, devices, given.dimension)
            hours = [f"{found[part]:,.2f}" for part in ("survey", "encode", "join", "hours", "device hours")]
            rows.append([f"{passages:,.0f}", devices, *hours, f"{found['disk'] / 1e9:,.0f} GB"])
    heads = ["passages", "devices", "survey h", "encode h", "join h", "together h", "device hours", "disk"]
    print("\n" + tabulate(rows, heads, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
