"""Training records and their reader; a problem names file, line and key, and says what to do.

A record is one JSON object a line (a ``.json`` file may also hold one array of such objects; Parquet files and saved
``datasets`` hold the same columns)::

    {"query": "…", "pos": ["…"], "neg": ["…", "…"], "pos_scores": [4.1], "neg_scores": [0.3, 1.2], "neg_q": ["…", ""]}

Choices:

* ``pos`` and ``neg`` may be a plain string, read as a list of one. Columns of other names are ignored.
* ``neg_q`` runs parallel to ``neg``: item i is a query that ``neg[i]`` answers, or a list of several such queries.
  A negative that has none is written ``""`` or ``[]``; ``null`` there is a problem, since it is usually a bug upstream.
* An optional column that is ``null`` as a whole counts as absent (that is how table tools write missing columns).
* All problems of all files are counted, the first 20 are shown, in one ``DataError``.
"""

from __future__ import annotations

from FlagEmbedding.schema.files import DataFile, find_files
from FlagEmbedding.schema.problems import SHOWN_PROBLEMS, Problem, Problems, unreadable
from FlagEmbedding.schema.records import TrainRecord, parse_record, read_records
from FlagEmbedding.schema.rows import kind_of, read_rows

__all__ = [
    "SHOWN_PROBLEMS",
    "DataFile",
    "Problem",
    "Problems",
    "TrainRecord",
    "find_files",
    "kind_of",
    "parse_record",
    "read_records",
    "read_rows",
    "unreadable",
]
