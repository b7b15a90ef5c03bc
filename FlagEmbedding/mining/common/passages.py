"""The passages that negatives are taken from: found, brought into one form, and read by place from disk.

A corpus is MIRACL's files, any JSON lines with a ``text`` (and perhaps a ``docid``, ``_id`` or ``id``, and a
``title``), or, where none is given, the passages of the training rows themselves, as upstream's script does. Whatever
it is, it becomes files of ``{"docid", "title", "text"}``, which is what the index of step 0 is built from.

``PassageStore`` keeps the texts end to end in one file with their offsets beside it: any text is one read, and memory
does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.collections.corpus import Passage, Survey, passage_text
from FlagEmbedding.collections.corpus import survey as survey_corpus
from FlagEmbedding.mining.common.rows import KeySet, json_line
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.schema import Problem, Problems, read_rows
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import fingerprints, made_by
from FlagEmbedding.utils.io import PathLike, atomic_open, read_json, sha256_file, write_json_atomic

TEXTS, OFFSETS, DOCID, RECORD = "texts", "offsets", "docid", "passages.json"
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_IDS = ("docid", "_id", "id")


def corpus_files(paths: Sequence[PathLike], work: Path) -> list[Path]:
    """The files that ``paths`` (files or folders) name, in the form of MIRACL's.

    A file that is in it already (``docid`` on its first line) is used where it lies; otherwise all are rewritten into
    ``work``, where a passage without an id gets its place as one. Raises ``DataError``.
    """
    named: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = [p for p in sorted(given.iterdir()) if p.name[0] != "." and p.name.endswith(_SUFFIXES)]
            if not inside:
                raise DataError(f"{given}: expected .jsonl or .jsonl.gz files of passages, found none")
            named += sorted(inside, key=_docs_number)
        elif given.is_file():
            named.append(given)
        else:
            raise DataError(f"{given}: there is no such corpus; give .jsonl(.gz) files or a folder of them")
    if all(_has_docid(path) for path in named):
        return named
    return _written(_plain_passages(named), work, named[0])


def passages_of_rows(files: Sequence[PathLike], work: Path) -> list[Path]:
    """Every different ``pos`` and ``neg`` of training files as a corpus in ``work``; memory does not grow with them."""
    return _written((("", text, None) for text in _row_passages(files)), work, files[0])


def _written(passages: Iterable[tuple[str, str, str | None]], work: Path, source: PathLike) -> list[Path]:
    """(title, text, docid) as a file in ``work``; where there is no docid, it is the passage's place."""
    target, place = work / "docs-0.jsonl", -1
    with clear_disk_errors(f"writing {target}"), atomic_open(target) as stream:
        for place, (title, text, docid) in enumerate(passages):
            stream.write(json_line({"docid": docid or str(place), "title": title, "text": text}))
        if place < 0:
            raise DataError(f"{source}: no passages in it; name a corpus with --corpus")
    return [target]


def index_label(path: PathLike) -> str:
    """The name of a corpus's index: a folder's whole name (``miracl-corpus-v1.0-ko``), a file's without suffix."""
    name = Path(path).name
    return next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)


def _docs_number(path: Path) -> tuple[int, str]:
    stem = path.name.split(".")[0]
    return (int(stem[5:]) if stem.startswith("docs-") and stem[5:].isdigit() else -1), path.name


def _has_docid(path: Path) -> bool:
    problems = Problems()
    _, row = next(read_rows(path, problems), (0, {}))
    problems.raise_if_any()
    return "docid" in row


def _plain_passages(paths: Sequence[Path]) -> Iterator[tuple[str, str, str | None]]:
    problems = Problems()
    for path in paths:
        for line, row in read_rows(path, problems):
            text = row.get("text")
            if not isinstance(text, str) or not text.strip():
                problems.add(Problem(str(path), line, "text", "is missing or empty", "give every passage its text"))
                continue
            docid = next((str(row[key]) for key in _IDS if isinstance(row.get(key), str | int)), None)
            yield str(row.get("title") or ""), text, docid
    problems.raise_if_any()


def _row_passages(paths: Sequence[PathLike]) -> Iterator[str]:
    problems, seen = Problems(), KeySet()
    for path in paths:
        for _, row in read_rows(path, problems):
            for texts in (row.get("pos"), row.get("neg")):
                for text in [texts] if isinstance(texts, str) else texts or []:
                    if isinstance(text, str) and text.strip() and seen.add(_key(text)):
                        yield text
    problems.raise_if_any()


def _key(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class PassageStore:
    """Texts of a corpus by place, and the places of docids. Open it with :meth:`prepare`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.survey = Survey(**record["survey"])
        self.rows = self.survey.total
        self.with_title: bool = record["identity"]["with_title"]
        self.corpus: list[dict[str, str]] = record["identity"]["corpus"]
        # Mapped, not read: what stays in memory is up to the system.
        self._texts = np.memmap(folder / TEXTS, dtype=np.uint8, mode="r")
        self._offsets = np.memmap(folder / OFFSETS, dtype="<i8", mode="r")

    @classmethod
    def prepare(
        cls, files: Sequence[Path], folder: Path, with_title: bool = False, allow_empty: bool = True
    ) -> PassageStore:
        """The store of a corpus in ``folder``: the one that is there when it fits, else written in one pass.

        Args:
            with_title: a text is title, space, text; otherwise the text alone.
            allow_empty: take passages without text.
        """
        path = folder / RECORD
        if path.is_file() and made_by(path, _identity(files, with_title)):
            return cls(folder, read_json(path))
        position = 0
        with (
            clear_disk_errors(f"writing {folder}"),
            atomic_open(folder / TEXTS, "wb") as texts,
            atomic_open(folder / OFFSETS, "wb") as offsets,
            atomic_open(folder / DOCID, "wb") as docids,
        ):

            def keep(passage: Passage) -> None:
                nonlocal position
                offsets.write(position.to_bytes(8, "little"))
                docids.write(f"{passage.docid}\n".encode())
                position += texts.write(f"{passage_text(passage, with_title)}\n".encode())

            survey = survey_corpus(files, allow_empty, keep)
            offsets.write(position.to_bytes(8, "little"))
        record = {"identity": _identity(files, with_title), "survey": asdict(survey)}
        write_json_atomic(path, record)
        return cls(folder, record)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < self.rows:
            raise IndexError(f"passage {row} of {self.rows}")
        start, stop = self._offsets[row : row + 2].tolist()
        return self._texts[start : stop - 1].tobytes().decode("utf-8")

    def rows_of(self, docids: set[str]) -> dict[str, int]:
        """Place of each of ``docids`` that the corpus has."""
        with open(self.folder / DOCID, "rb") as lines:
            wanted = {docid.encode() for docid in docids}
            return {line[:-1].decode(): row for row, line in enumerate(lines) if line[:-1] in wanted}

    def docid_digest(self) -> str:
        """SHA-256 of the docids, one per line: the same as that of an index over the same passages."""
        return sha256_file(self.folder / DOCID)


def _identity(files: Sequence[Path], with_title: bool) -> dict[str, Any]:
    """What decides a store; the files are read for it only where this process has not read them yet."""
    return {"corpus": fingerprints(files), "with_title": with_title}
