"""Carrying ``neg_q`` along when the negatives of a row change.

``neg_q`` runs parallel to ``neg``. Mining again exchanges negatives; a list that stayed as it was would then pair
negatives with queries they do not answer, and the penalty would pull on the wrong pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from FlagEmbedding.schema import TrainRecord
from FlagEmbedding.utils.texts import text_key


def realign(record: TrainRecord, negatives: Sequence[str]) -> list[list[str]]:
    """Queries of each of ``negatives``: those the row had where the negative stays, none where it is new."""
    known: dict[bytes, list[str]] = {}
    for text, queries in zip(record.neg, record.neg_q or [], strict=False):
        for query in queries:
            listed = known.setdefault(text_key(text), [])
            if query not in listed:
                listed.append(query)
    return [known.get(text_key(text), []) for text in negatives]


def written(queries: Sequence[Sequence[str]]) -> list[str | list[str]]:
    """``neg_q`` as it stands in files: one query is plain text, none is ``""``, several are a list."""
    return [list(item) if len(item) > 1 else (item[0] if item else "") for item in queries]
