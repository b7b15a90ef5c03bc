"""Time one engine's training steps; prints one line of JSON.

    python benchmarks/time_train.py --engine this|flagembedding|sentence-transformers --model M --data FOLDER

``this`` goes through run.py's own parser and runner; the peers through theirs. All three end in the Hugging Face
Trainer, so one stopwatch times them all: from the end of the last warm-up step to the end of the last step, which
holds data loading, tokenising, forward, backward and the optimiser. The objective is the same: InfoNCE over one
positive, ``group-size - 1`` negatives and the in-batch passages, CLS pooling, temperature 0.02, dropout as the model's
config says (0.1). ``--clp`` adds the penalty (``this`` only). ``--extra`` is handed on to run.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEED = 7


def make_stopwatch() -> Any:
    """A Trainer callback that notes the time at the end of each step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []
            self.losses: list[float] = []
            self.peak = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(round(float(logs["loss"]), 4))

    return Stopwatch()


def common(arguments: argparse.Namespace, out: str) -> dict[str, Any]:
    """TrainingArguments that all three share."""
    return {
        "output_dir": out,
        "max_steps": arguments.warmup + arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.accumulation,
        "learning_rate": 1e-5,
        "logging_steps": 10,  # as published; a log line of ours also routes a probe through the experts
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.dtype == "bf16",
        "dataloader_drop_last": True,
        "disable_tqdm": True,
    }


def this(arguments: argparse.Namespace, out: str, stopwatch: Any) -> None:
    """run.py, without the process around it."""
    import transformers.trainer

    from FlagEmbedding.finetune.parsing import parse_arguments
    from FlagEmbedding.finetune.runner import run

    words = ["--model_name_or_path", arguments.model, "--train_data", arguments.data, "--temperature", 0.02]
    words += ["--train_group_size", arguments.group_size, "--query_max_len", arguments.query_max_len]
    words += ["--passage_max_len", arguments.passage_max_len, "--cache_path", f"{out}/rows"]
    words += ["--penalty_weight", 0.1 if arguments.clp else 0.0, *arguments.extra]
    for name, value in common(arguments, out).items():
        words += [f"--{name}", value]
    transformers.trainer.DEFAULT_CALLBACKS.append(stopwatch)
    run(parse_arguments(list(map(str, words))))


def flagembedding(arguments: argparse.Namespace, out: str, stopwatch: Any) -> None:
    """Upstream's runner for BGE-M3, dense loss."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import (
        EncoderOnlyEmbedderM3DataArguments,
        EncoderOnlyEmbedderM3ModelArguments,
        EncoderOnlyEmbedderM3Runner,
        EncoderOnlyEmbedderM3TrainingArguments,
    )

    runner = EncoderOnlyEmbedderM3Runner(
        EncoderOnlyEmbedderM3ModelArguments(model_name_or_path=str(arguments.model)),
        EncoderOnlyEmbedderM3DataArguments(
            train_data=[str(arguments.data)],
            train_group_size=arguments.group_size,
            query_max_len=arguments.query_max_len,
            passage_max_len=arguments.passage_max_len,
            cache_path=f"{out}/rows",
        ),
        EncoderOnlyEmbedderM3TrainingArguments(
            temperature=0.02,
            normalize_embeddings=True,
            sentence_pooling_method="cls",
            unified_finetuning=False,
            sub_batch_size=arguments.sub_batch or None,
            **common(arguments, out),
        ),
    )
    runner.trainer.add_callback(stopwatch)
    runner.trainer.train()


def sentence_transformers(arguments: argparse.Namespace, out: str, stopwatch: Any) -> None:
    """sentence-transformers' trainer and its InfoNCE; the cached one with ``--sub-batch``."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    model = SentenceTransformer(str(arguments.model), device=arguments.device)
    model.max_seq_length = arguments.passage_max_len
    columns = []
    for row in read_rows(arguments.data):
        negatives = {f"negative_{i}": text for i, text in enumerate(row["neg"][: arguments.group_size - 1])}
        columns.append({"anchor": row["query"], "positive": row["pos"][0], **negatives})
    if arguments.sub_batch:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=arguments.sub_batch)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=50.0)
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**common(arguments, out)),
        train_dataset=Dataset.from_list(columns),
        loss=loss,
        callbacks=[stopwatch],
    ).train()


ENGINES = {"this": this, "flagembedding": flagembedding, "sentence-transformers": sentence_transformers}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All training rows of a folder."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def first_rows(folder: Path, count: int, out: Path) -> Path:
    """The first ``count`` rows of a folder, in a folder of their own."""
    out.mkdir()
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_rows(folder)[:count]), "utf-8")
    return out


def expected_tokens(arguments: argparse.Namespace) -> int:
    """Real tokens of the timed steps: the mean row, times the rows drawn (every row has exactly group-size - 1)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(arguments.model))

    def count(texts: list[str], longest: int) -> int:
        return sum(map(len, tokenizer(texts, truncation=True, max_length=longest)["input_ids"]))

    rows = read_rows(arguments.data)
    used = arguments.group_size - 1
    total = 0
    for row in rows:
        total += count([row["query"]], arguments.query_max_len)
        total += count([row["pos"][0], *row["neg"][:used]], arguments.passage_max_len)
        if arguments.clp:
            total += count(row["neg_q"][:used], arguments.passage_max_len)
    return round(total / len(rows) * arguments.steps * arguments.batch_size * arguments.accumulation)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps, and how near the matrix products they came."""
    import torch
    from floor import compare_with_floor

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    stopwatch = make_stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.rows:
            arguments.data = first_rows(arguments.data, arguments.rows, Path(scratch) / "data")
        ENGINES[arguments.engine](arguments, f"{scratch}/out", stopwatch)
        tokens = expected_tokens(arguments)
    start, end = stopwatch.ends[arguments.warmup - 1], stopwatch.ends[-1]
    wall, busy = end[0] - start[0], end[1] - start[1]
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    record = {
        "engine": arguments.engine,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "rows_per_step": arguments.batch_size * arguments.accumulation,
        "tokens": tokens,
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(busy, 3),
        "tokens_per_second": round(tokens / wall, 1),
        "peak_rss_mb": round(stopwatch.peak),
        "losses": stopwatch.losses,
    }
    if arguments.device != "cpu":
        record["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    floor = compare_with_floor(arguments.model, tokens, dtype, arguments.device, True, wall, busy)
    return {**record, **floor}


def parser() -> argparse.ArgumentParser:
    """The options of one measurement."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", required=True, choices=ENGINES)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True, help="folder of training rows")
    options.add_argument(
        "--rows", type=int, default=0, help="first so many rows, so that few steps see the same; 0: all"
    )
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--accumulation", type=int, default=1)
    options.add_argument("--group-size", type=int, default=5)
    options.add_argument("--query-max-len", type=int, default=64)
    options.add_argument("--passage-max-len", type=int, default=256)
    options.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--clp", action="store_true", help="this: with the penalty and its negative queries")
    options.add_argument("--sub-batch", type=int, default=0, help="peers: their sub-batch or cached mini-batch")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1, help="torch threads; 0: all cores")
    options.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="this: more flags of run.py, at the end")
    return options


def main() -> int:
    arguments = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What libraries print belongs to stderr: stdout carries one line.
    answer, sys.stdout = sys.stdout, sys.stderr
    record = measure(arguments)
    print(json.dumps(record), file=answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
