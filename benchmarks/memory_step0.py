"""Does memory grow with the corpus? Peak RSS of the real step 0 and step 1 at several corpus sizes.

    python benchmarks/memory_step0.py --passages 10000 100000 1000000

The encoder is real but small (one layer, width 128, own word tokenizer), the passages are short, so that a million of
them take minutes. What is measured is the peak resident set of each process as the kernel counts it (wait4); step 1
searches for 200 queries, 100 hits each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH = 128
WORDS = [f"word{i}" for i in range(2000)]


def make_encoder(folder: Path) -> None:
    """A one-layer XLM-R with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **names)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def make_corpus(root: Path, count: int) -> None:
    """``count`` passages of 3 to 8 words in files of 250,000, as MIRACL cuts its own."""
    folder = root / "miracl-corpus-v1.0-sw"
    folder.mkdir(parents=True)
    generator = random.Random(count)
    for number, first in enumerate(range(0, count, 250_000)):
        with gzip.open(folder / f"docs-{number}.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as out:
            for i in range(first, min(count, first + 250_000)):
                text = " ".join(generator.choices(WORDS, k=generator.randint(3, 8)))
                out.write(json.dumps({"docid": f"{i}#0", "title": "", "text": text}) + "\n")

    topics = root / "miracl-v1.0-sw" / "topics"
    topics.mkdir(parents=True)
    lines = "".join(f"{i}\t{' '.join(generator.choices(WORDS, k=5))}\n" for i in range(200))
    (topics / "topics.miracl-v1.0-sw-dev.tsv").write_text(lines, encoding="utf-8")


def run(script: str, *words: str) -> dict[str, float]:
    """Run one evaluation script to its end; peak RSS in MB, wall and processor seconds."""
    command = [sys.executable, str(REPOSITORY / "evaluation" / script), "--languages", "sw", *words]
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def measure(scratch: Path, count: int) -> dict[str, Any]:
    """Peak RSS and time of both steps over ``count`` passages."""
    corpus, out = scratch / f"corpus-{count}", scratch / f"index-{count}"
    make_corpus(corpus, count)
    words = ["--encoder", str(scratch / "one-layer"), "--data_dir", str(corpus), "--index_save_dir", str(out)]
    step0 = run("step0-generate_embedding.py", *words)
    step1 = run("step1-search_results.py", *words, "--result_save_dir", str(out / "runs"), "--hits", "100")
    index = out / "one-layer" / "sw" / "index"
    return {"passages": count, "index_mb": round(index.stat().st_size / 2**20, 1), "step0": step0, "step1": step1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_encoder(Path(name) / "one-layer")
        for count in arguments.passages:
            rows.append(measure(Path(name), count))
            print(json.dumps(rows[-1]), flush=True)
    heads = ["passages", "index, MB", "step 0: peak RSS, MB", "CPU s", "step 1: peak RSS, MB", "CPU s"]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        cells = [f"{row['passages']:,}", row["index_mb"]]
        cells += [row[step][key] for step in ("step0", "step1") for key in ("peak_rss_mb", "cpu_seconds")]
        print(f"| {' | '.join(map(str, cells))} |")
    if arguments.output:
        sys.path.insert(0, str(REPOSITORY))
        from FlagEmbedding.utils.provenance import provenance

        arguments.output.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
