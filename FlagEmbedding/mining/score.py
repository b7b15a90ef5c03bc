"""Teacher scores for rows as they are: ``python -m FlagEmbedding.mining.score``.

A reranker scores each row's passages for its query into ``pos_scores`` and ``neg_scores``, for ``run.py
--knowledge_distillation``; all else stays. ``hard_negatives --with_scores --reranker`` does it while it mines. After a
kill the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from FlagEmbedding.mining.common.options import OutputArguments, RerankerArguments
from FlagEmbedding.utils.cli import entry_point, option, parse, switch
from FlagEmbedding.utils.errors import UsageError


@dataclass(frozen=True)
class ScoreRowsArguments:
    """Rows."""

    input_file: list[str] = option(help="files, or folders of them: rows of query, pos, neg", metavar="PATH")
    cache_dir: str | None = option(None, "where the hub's files are kept")
    trust_remote_code: bool = switch(False, "run code that comes with the reranker")


def score_rows(given: ScoreRowsArguments, options: RerankerArguments, output: OutputArguments) -> int:
    """Score; returns the number of rows. Raises ``UserError``."""
    if options.cross_encoder is None:
        raise UsageError("--reranker is missing: name the cross-encoder that scores the passages")
    from FlagEmbedding.inference.arguments import EncoderArguments
    from FlagEmbedding.mining.common.jobs import Job, check_output, progress
    from FlagEmbedding.mining.common.reranker import Reranker
    from FlagEmbedding.mining.common.rows import data_files, valid_rows
    from FlagEmbedding.schema import Problems
    from FlagEmbedding.utils.identity import fingerprints, model_fingerprint

    check_output(output.path, output.overwrite)
    files, problems = data_files(given.input_file), Problems()
    total = sum(1 for _ in valid_rows(files, problems))
    problems.raise_if_any()
    name = options.cross_encoder
    hub = EncoderArguments(name, cache_dir=given.cache_dir, trust_remote_code=given.trust_remote_code)
    reranker = Reranker(options, hub)
    model = model_fingerprint(name) if Path(name).is_dir() else name
    identity = {"inputs": [file["sha256"] for file in fingerprints(files)], **asdict(options), "model": model}
    with Job(output.path, identity, overwrite=output.overwrite) as job:
        left = islice(valid_rows(files, Problems()), job.done, None)
        for row, record in progress("scores", left, total=total, done=job.done):
            scores = reranker.score(record.query, [*record.pos, *record.neg])
            count = len(record.pos)
            job.add([{**row, "pos_scores": scores[:count], "neg_scores": scores[count:]}])
        return job.finish()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and score."""
    groups = (ScoreRowsArguments, RerankerArguments, OutputArguments)
    given, options, output = parse(groups, argv, "Teacher scores of a reranker for training rows.")
    rows = score_rows(given, options, output)
    print(f"{output.output_file}: {rows:,} rows with pos_scores and neg_scores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
