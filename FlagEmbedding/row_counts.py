"""What a file of training rows holds, counted while it is read: for training, ``check_data`` and the doctor alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from FlagEmbedding.schema import SHOWN_PROBLEMS, DataFile, Problem, Problems, TrainRecord, read_records
from FlagEmbedding.utils.texts import text_key, text_keys


@dataclass
class FileStatistics:
    """Counts over the valid rows of one file; ``unscored`` are the first lines without teacher scores.

    ``twins`` are negatives that read like a positive of their row, ``first_twin`` is the line of the first; only
    :func:`scan_file` looks for them.
    """

    rows: int = 0
    scored: int = 0
    with_neg_q: int = 0
    negatives: int = 0
    negatives_with_query: int = 0
    fewest_negatives: int = 0
    unscored: list[int] = field(default_factory=list)
    twins: int = 0
    first_twin: int = 0

    def observe(self, record: TrainRecord) -> None:
        """Count one row."""
        negatives = len(record.neg)
        self.fewest_negatives = min(self.fewest_negatives, negatives) if self.rows else negatives
        self.rows += 1
        self.negatives += negatives
        if record.pos_scores is not None and record.neg_scores is not None:
            self.scored += 1
        elif len(self.unscored) < SHOWN_PROBLEMS:
            self.unscored.append(record.line)
        if record.neg_q is not None:
            self.with_neg_q += 1
            self.negatives_with_query += sum(map(bool, record.neg_q))


def scan_file(path: str, problems: Problems) -> FileStatistics:
    """Check and count a file without converting it."""
    statistics = FileStatistics()
    for record in read_records(path, problems):
        statistics.observe(record)
        known = text_keys(record.pos)
        twins = sum(text_key(text) in known for text in record.neg)
        if twins and not statistics.twins:
            statistics.first_twin = record.line
        statistics.twins += twins
    return statistics


def report_missing_scores(file: DataFile, statistics: FileStatistics, problems: Problems) -> None:
    """Add the rows without teacher scores of a file whose other rows have them."""
    if 0 < statistics.scored < statistics.rows:
        hint = f"{statistics.scored} of {statistics.rows} rows here have both: give them to all rows, or to none"
        for line in statistics.unscored:
            problems.add(Problem(file.path, line, "pos_scores, neg_scores", "are missing", hint))
        problems.count += statistics.rows - statistics.scored - len(statistics.unscored)
