"""A report on training files: ``python -m FlagEmbedding.mining.doctor PATH… [--model CHECKPOINT]``.

By reading alone: problems with file, line and hint, repeated rows and passages, negatives that are known to answer,
coverage of ``neg_q``, lengths. With ``--model``: cosines and margins, rows that are solved already, lengths in tokens
and what training would cut off. One page of Markdown with two pictures and the same as JSON, in ``--report_dir``.
Exits 2 when there are rows that training would refuse; the report is written all the same.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from FlagEmbedding.mining.common.rows import load_tokenizer
from FlagEmbedding.mining.doctor.arguments import DoctorOptions
from FlagEmbedding.mining.doctor.plots import plot_lengths, plot_scores
from FlagEmbedding.mining.doctor.report import length_figures, markdown
from FlagEmbedding.mining.doctor.scan import lengths, scan
from FlagEmbedding.mining.doctor.scores import embed, score
from FlagEmbedding.mining.doctor.twins import find_token_twins
from FlagEmbedding.schema import Problems, find_files
from FlagEmbedding.utils.identity import fingerprints
from FlagEmbedding.utils.io import atomic_open, write_json_atomic
from FlagEmbedding.utils.provenance import provenance


def examine(options: DoctorOptions) -> tuple[dict[str, Any], Problems]:
    """Run the command; returns the record and the problems of the data. Raises ``UserError``."""
    reading, settings, folder, problems = options.reading, options.settings, options.reading.folder, Problems()
    files = [Path(file.path) for file in find_files(reading.paths, problems)]
    if not files:
        problems.raise_if_any()
    work = folder / ".work"
    work.mkdir(parents=True, exist_ok=True)
    found = scan(files, problems, work, reading)
    if not sum(counts.rows for counts in found.files.values()):
        problems.raise_if_any()
    tokenizer, scores = None, None
    if options.encoder.encoder:
        # Here, so that a report without a model does without torch.
        from FlagEmbedding.inference.text_encoder import TextEncoder

        encoder = TextEncoder(options.encoder)
        tokenizer = encoder.tokenizer
        settings = replace(
            settings,
            query_instruction_for_retrieval=encoder.instruction("query", settings.query_instruction_for_retrieval),
            passage_instruction_for_retrieval=encoder.instruction(
                "passage", settings.passage_instruction_for_retrieval
            ),
        )
        inputs = [[file["sha256"] for file in fingerprints(files)], reading.sample_rows, reading.seed]
        scores = score(found.texts, embed(work, found.texts, encoder, settings, inputs), settings.temperature)
        plot_scores(scores, folder / "scores.png")
    elif options.encoder.tokenizer:
        tokenizer = load_tokenizer("--tokenizer", options.encoder.tokenizer, options.encoder.cache_dir)
    limits = {name: getattr(settings, name) for name in ("query_max_len", "passage_max_len")} if tokenizer else {}
    unit, sizes = "tokens" if tokenizer else "characters", lengths(found.texts, tokenizer)
    plot_lengths(sizes, unit, limits, folder / "lengths.png")
    if tokenizer is not None:
        found.findings["same_tokens"] = find_token_twins(found.texts, tokenizer, settings)
    by_file = {path: counts.figures() for path, counts in found.files.items()}
    record = {
        "what": " ".join(reading.paths),
        "problems": {"count": problems.count, "first": [str(problem) for problem in problems.first]},
        "files": by_file,
        "neg_q": {key: sum(c[key] for c in by_file.values()) for key in ("negatives", "with_query", "queries")},
        "findings": {name: asdict(finding) for name, finding in found.findings.items()},
        "scores": scores and scores.figures(),
        "lengths": length_figures(sizes, limits),
        "settings": {**asdict(settings), "model": options.encoder.encoder or None, "unit": unit},
        "sample_rows": None if found.sampled is None else len(found.sampled),
        "provenance": provenance(),
    }
    found.texts.close()
    write_json_atomic(folder / "report.json", record)
    with atomic_open(folder / "report.md") as stream:
        stream.write(markdown(record))
    for name in ("answers", "texts", "vectors.f32", "vectors.json"):  # a file of somebody else stays
        (work / name).unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()
    return record, problems
