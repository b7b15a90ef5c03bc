"""A report on training files: ``python -m FlagEmbedding.mining.doctor PATH… [--model CHECKPOINT]``.

By reading alone: problems with file, line and hint, repeated rows and passages, negatives that are known to answer,
coverage of ``neg_q``, lengths. With ``--model``: cosines and margins, rows that are solved already, lengths in tokens
and what training would cut off. One page of Markdown with two pictures and the same as JSON, in ``--report_dir``.
Exits 2 when there are rows that training would refuse; the report is written all the same.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.rows import load_tokenizer
from FlagEmbedding.mining.doctor.arguments import DoctorOptions
from FlagEmbedding.mining.doctor.plots import plot_lengths, plot_scores
from FlagEmbedding.mining.doctor.report import length_figures, markdown
from FlagEmbedding.mining.doctor.scan import Scan, lengths, scan
from FlagEmbedding.mining.doctor.scores import Scores, VectorFile, figures, score
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.provenance import provenance


def examine(options: DoctorOptions) -> tuple[dict[str, Any], Problems]:
    """Run the command; returns the record and the problems of the data. Raises ``UserError``."""
    reading, settings, problems = options.reading, options.settings, Problems()
    files = [Path(file.path) for file in find_files(reading.paths, problems)]
    if not files:
        problems.raise_if_any()
    work = reading.folder / ".work"
    work.mkdir(parents=True, exist_ok=True)
    found = scan(files, problems, work, reading)
    if not found.rows:
        problems.raise_if_any()
    tokenizer, scores = None, None
    if options.encoder.encoder:
        # Here, so that a report without a model does without torch.
        from FlagEmbedding.inference.text_encoder import TextEncoder

        encoder = TextEncoder(options.encoder)
        tokenizer = encoder.tokenizer
        inputs = [[file["sha256"] for file in fingerprints(files)], reading.sample_rows, reading.seed]
        scores = score(found.texts, VectorFile(work, found.texts, encoder, settings, inputs), settings.temperature)
        plot_scores(scores, reading.folder / "scores.png")
    elif options.encoder.tokenizer:
        tokenizer = load_tokenizer("--tokenizer", options.encoder.tokenizer)
    limits = {name: getattr(settings, name) for name in ("query_max_len", "passage_max_len")} if tokenizer else {}
    sizes = lengths(found.texts, tokenizer)
    plot_lengths(sizes, "tokens" if tokenizer else "characters", limits, reading.folder / "lengths.png")
    record = _record(options, found, scores, length_figures(sizes, limits))
    record["settings"]["unit"] = "tokens" if tokenizer else "characters"
    found.texts.close()
    write_json_atomic(reading.folder / "report.json", record)
    with atomic_open(reading.folder / "report.md") as stream:
        stream.write(markdown(record))
    shutil.rmtree(work, ignore_errors=True)
    return record, problems


def _record(options: DoctorOptions, found: Scan, scores: Scores | None, sizes: dict[str, Any]) -> dict[str, Any]:
    files = {path: counts.figures() for path, counts in found.files.items()}
    totals = {key: sum(counts[key] for counts in files.values()) for key in ("negatives", "with_query", "queries")}
    return {
        "what": " ".join(options.reading.paths),
        "problems": {"count": found.problems.count, "first": [str(problem) for problem in found.problems.first]},
        "files": files,
        "neg_q": totals,
        "findings": {name: asdict(finding) for name, finding in found.findings.items()},
        "scores": figures(scores) if scores is not None else None,
        "lengths": sizes,
        "settings": {**asdict(options.settings), "model": options.encoder.encoder or None},
        "sample_rows": len(found.sampled) if found.sampled is not None else None,
        "provenance": provenance(),
    }
