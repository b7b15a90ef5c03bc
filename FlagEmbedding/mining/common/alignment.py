"""When two texts count as the same, and carrying ``neg_q`` along when the negatives of a row change.

``neg_q`` runs parallel to ``neg``. Mining again exchanges negatives; a list that stayed as it was would then pair
negatives with queries they do not answer, and the penalty would pull on the wrong pairs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from FlagEmbedding.schema import TrainRecord


def normalize_text(text: str) -> str:
    """``text`` for comparison: NFKC, lower case, one space for any white space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> bytes:
    """Sixteen bytes that are equal for texts that count as the same."""
    return blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def text_keys(texts: Iterable[str]) -> set[bytes]:
    """The keys of some texts."""
    return {text_key(text) for text in texts}


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
