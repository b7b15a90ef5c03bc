"""What a run came to, as a page whose last line is the command to go on with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.from_corpus.arguments import FromCorpusOptions
from FlagEmbedding.mining.from_corpus.sampling import LEFT_OUT
from FlagEmbedding.mining.hard_negatives.filters import REASONS as NOT_MINED
from FlagEmbedding.mining.query_generation.report import MEANING, SOURCES
from FlagEmbedding.utils.pages import percent, render

_PAGE, _DRY_RUN = (Path(__file__).with_name(name) for name in ("report.md.j2", "dry_run.md.j2"))
_GROUP = 8  # passages per query, the published 1 + 7


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page."""
    counts, stages, mining, neg_q = (record[name] for name in ("counts", "stages", "mining", "neg_q"))
    passages = [[name, counts.get(name, 0)] for name in ("passages", *LEFT_OUT, "drawn", "dev")]
    kinds = [
        [name, stage["asked"], stage["accepted"], percent(stage["accepted"], stage["asked"]), stage["prompt"],
         stage["completion"]]
        for name, stage in stages.items()
    ]  # fmt: skip
    reasons = sorted({reason for stage in stages.values() for reason in stage["rejected"]})
    rejected = [
        [reason, *(stage["rejected"].get(reason, 0) for stage in stages.values()), MEANING[reason]]
        for reason in reasons
    ]
    left_out = [[reason, count, NOT_MINED[reason]] for reason, count in mining["left_out"].items()]
    sources = [[SOURCES[name], count, percent(count, sum(neg_q.values()))] for name, count in neg_q.items()]
    not_asked = sum(stage["not_asked"] for stage in stages.values())
    return render(_PAGE, record=record, passages=passages, kinds=kinds, rejected=rejected, left_out=left_out,
                  sources=sources, stages=list(stages), not_asked=not_asked)  # fmt: skip


def dry_run_page(record: Mapping[str, Any]) -> str:
    """What a run would ask and cost, before it does."""
    return render(_DRY_RUN, **record)


def next_command(options: FromCorpusOptions, record: Mapping[str, Any]) -> str:
    """The command that trains on the result, as a shell takes it."""
    output, encoder, search = options.output.path, options.encoder, options.search
    start = ["python", "run.py"] if Path("run.py").is_file() else ["flagembedding-train"]
    words: list[object] = [
        "--model_name_or_path", encoder.encoder, "--train_data", output / "train", "--output_dir", output / "model",
        "--train_group_size", min(1 + options.sampling.negative_number, _GROUP), "--query_max_len", 128,
        "--passage_max_len", search.passage_max_length or 512, "--per_device_train_batch_size", 4,
        "--learning_rate", "1e-5", "--num_train_epochs", 1, "--logging_steps", 10,
    ]  # fmt: skip
    given: dict[str, object] = {
        "sentence_pooling_method": encoder.pooling_method, "cache_dir": encoder.cache_dir,
        "query_instruction_for_retrieval": search.query_instruction_for_retrieval,
        "passage_instruction_for_retrieval": search.passage_instruction_for_retrieval,
        "knowledge_distillation": options.output.with_scores or None,
    }  # fmt: skip
    if record["topics"]:
        given |= {
            "eval_data_dir": output / "eval", "eval_languages": record["language"],
            "eval_with_title": search.with_title or None,
            "eval_query_length": search.query_max_length if search.query_max_length != 512 else None,
            "eval_passage_length": search.passage_max_length,
        }  # fmt: skip
    for name, value in given.items():
        words += [f"--{name}", value] if value is not None else []
    return shlex.join([*start, *map(str, words)])
