"""A report on training files: ``python -m FlagEmbedding.mining.doctor PATH… [--model CHECKPOINT]``.

By reading alone: problems with file, line and cure, repeated rows and passages, negatives that are known to answer,
coverage of ``neg_q``, lengths. With ``--model``: cosines and margins, rows that are solved already, lengths in tokens
and what training would cut off. One page of Markdown with two pictures and the same as JSON, in ``--report_dir``.
Exits 2 when there are rows that training would refuse; the report is written all the same.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.doctor.plots import plot_lengths, plot_scores
from FlagEmbedding.mining.doctor.report import length_figures, markdown
from FlagEmbedding.mining.doctor.scan import Scan, lengths, scan
from FlagEmbedding.mining.doctor.scores import Scores, ScoreSettings, VectorFile, figures, score
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.cli import Parser, add_bool_flag, entry_point
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.provenance import provenance

logger = get_logger(__name__)


def examine(a: argparse.Namespace) -> tuple[dict[str, Any], Problems, Path]:
    """Run the command; returns the record, the problems of the data, and the page. Raises ``UserError``."""
    problems = Problems()
    files = [Path(file.path) for file in find_files(a.paths, problems)]
    if not files:
        problems.raise_if_any()
    folder = Path(a.report_dir) if a.report_dir else _default_folder(a.paths[0])
    work = folder / ".work"
    work.mkdir(parents=True, exist_ok=True)
    found = scan(files, problems, work, a.train_group_size, a.sample_rows, a.seed)
    if not found.rows:
        problems.raise_if_any()
    encoder = _encoder(a) if a.model else None
    tokenizer = encoder.tokenizer if encoder else _tokenizer(a.tokenizer) if a.tokenizer else None
    limits = {"query_max_len": a.query_max_len, "passage_max_len": a.passage_max_len} if tokenizer else {}
    settings = ScoreSettings(
        a.query_max_len, a.passage_max_len, a.query_instruction_for_retrieval, a.passage_instruction_for_retrieval,
        a.batch_size, a.temperature,
    )  # fmt: skip
    scores = None
    if encoder is not None:
        inputs = [[file["sha256"] for file in fingerprints(files)], a.sample_rows, a.seed]
        scores = score(found, files, VectorFile(work, found.texts, encoder, settings, inputs), a.temperature)
        plot_scores(scores, folder / "scores.png")
    sizes = lengths(found.texts, tokenizer)
    unit = "tokens" if tokenizer else "characters"
    plot_lengths(sizes, unit, limits, folder / "lengths.png")
    record = _record(
        a, found, scores, length_figures(sizes, limits), {**asdict(settings), "unit": unit, "model": a.model}
    )
    found.texts.close()
    page = _write(folder, record)
    shutil.rmtree(work, ignore_errors=True)
    return record, problems, page


def _default_folder(path: str) -> Path:
    given = Path(path)
    return (given if given.is_dir() else given.parent) / "reports" / "doctor"


def _encoder(a: argparse.Namespace) -> Any:
    from FlagEmbedding.inference.arguments import EncoderArguments
    from FlagEmbedding.inference.text_encoder import TextEncoder

    options = EncoderArguments(
        encoder=a.model,
        pooling_method=a.pooling_method,
        dtype=a.dtype,
        batch_size=a.batch_size,
        cache_dir=a.cache_dir,
        trust_remote_code=a.trust_remote_code,
    )
    return TextEncoder(options)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--tokenizer {name}: no tokenizer can be loaded from there ({reason})") from error


def _record(
    a: argparse.Namespace, found: Scan, scores: Scores | None, sizes: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    files = {path: asdict(counts) for path, counts in found.files.items()}
    totals = {key: sum(counts[key] for counts in files.values()) for key in ("negatives", "with_query", "queries")}
    return {
        "what": " ".join(a.paths),
        "problems": {"count": found.problems.count, "first": [str(problem) for problem in found.problems.first]},
        "files": files,
        "neg_q": totals,
        "findings": {name: asdict(finding) for name, finding in found.findings.items()},
        "scores": figures(scores) if scores is not None else None,
        "lengths": sizes,
        "settings": settings,
        "sample_rows": len(found.sampled) if found.sampled is not None else None,
        "provenance": provenance(),
    }


def _write(folder: Path, record: dict[str, Any]) -> Path:
    write_json_atomic(folder / "report.json", record)
    page = folder / "report.md"
    with atomic_open(page) as stream:
        stream.write(markdown(record))
    return page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check. Raises ``UsageError``."""
    parser = Parser("A report on training files: problems, repeats, false negatives, margins, lengths, neg_q.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a folder of .json/.jsonl files, or such a file")
    add("--report_dir", help="where the report goes; default: reports/doctor in the folder, or beside the file")
    add("--train_group_size", type=int, help="names rows with too few negatives for it")
    add("--sample_rows", type=int, default=0, help="look at the texts of this many rows only, drawn by --seed; 0: all")
    add("--seed", type=int, default=42, help="decides which")
    add("--model", "--encoder", dest="model", help="checkpoint for cosines, margins and tokens: hub id or folder")
    add("--tokenizer", help="instead of --model: lengths in tokens without embedding anything")
    add("--query_max_len", type=int, default=128, help="tokens, as in training")
    add("--passage_max_len", type=int, default=512, help="tokens, as in training")
    add("--temperature", type=float, default=0.02, help="of the loss")
    add("--pooling_method", choices=["cls", "mean"], help="default: what the checkpoint says, else cls")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="fp32", help="to compute in")
    add("--batch_size", type=int, default=256, help="at most this many texts of full length at a time")
    add("--query_instruction_for_retrieval", metavar="TEXT", help="text put before every query")
    add("--passage_instruction_for_retrieval", metavar="TEXT", help="text put before every passage")
    add("--cache_dir", help="where the hub's files are kept")
    add_bool_flag(parser, "--trust_remote_code", help="run code that comes with the checkpoint")
    a = parser.parse_args(argv)
    if a.model and a.tokenizer:
        raise UsageError("--model brings its own tokenizer: leave --tokenizer out")
    if a.temperature <= 0:
        raise UsageError(f"--temperature must be above 0, got {a.temperature:g}")
    for name in ("query_max_len", "passage_max_len", "batch_size"):
        if getattr(a, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(a, name)}")
    if a.sample_rows < 0:
        raise UsageError(f"--sample_rows must be at least 0, got {a.sample_rows}")
    return a


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, examine, print the page."""
    record, problems, page = examine(parse(argv))
    print(markdown(record), end="")
    logger.info("report: %s", page)
    problems.raise_if_any()
    return 0
