"""The passages that negatives are taken from: found, brought into one form, and read by place from disk.

A corpus is MIRACL's files, any JSON lines with a ``text`` (and perhaps a ``docid``, ``_id`` or ``id``, and a
``title``), or, where none is given, the passages of the training rows themselves, as upstream's script does. Whatever
it is, it becomes files of ``{"docid", "title", "text"}``, which is what the index of step 0 is built from.

``PassageStore`` keeps the texts end to end in one file with their offsets beside it: any text is one read, and memory
does not grow with the corpus.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from FlagEmbedding.collections.corpus import Passage, Survey, passage_text
from FlagEmbedding.collections.corpus import survey as survey_corpus
from FlagEmbedding.collections.miracl import numbered_docs
from FlagEmbedding.mining.common.rows import KeySet, json_line
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.schema import Problems, kind_of, read_rows
from FlagEmbedding.schema.tables import is_table
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.identity import fingerprints, made_by
from FlagEmbedding.utils.io import (
    PathLike,
    atomic_open,
    numbered_lines,
    packing,
    parse_json,
    read_json,
    sha256_file,
    write_json_atomic,
)
from FlagEmbedding.utils.texts import half_pair, is_blank

TEXTS, OFFSETS, DOCID, RECORD = "texts", "offsets", "docid", "passages.json"
_IDS = ("docid", "_id", "id")


class Plain(NamedTuple):
    """A passage as files of any origin have it; ``where``: its file and line."""

    title: str
    text: str
    docid: str | None = None
    where: str = ""


def corpus_files(paths: Sequence[PathLike], work: Path) -> list[Path]:
    """The files that ``paths`` (files or folders) name, in the form of MIRACL's.

    Files that are in it already (``docid`` or BEIR's ``_id`` on their first line) are used where they lie; otherwise
    all are rewritten into ``work``, where a passage without an id gets its place as one. Raises ``DataError``.
    """
    named: list[Path] = []
    for given in map(Path, paths):
        if os.path.isdir(given):
            named += _of_folder(given)
        elif os.path.isfile(given):
            named.append(given)
        else:
            raise DataError(f"{given}: there is no such corpus; give .jsonl(.gz) files or a folder of them")
    if all(_lies_ready(path) for path in named):
        return named
    return _written(_plain_passages(named), work, named[0])


def _of_folder(folder: Path) -> list[Path]:
    """MIRACL's files where it holds any, else everything that can hold passages."""
    if docs := numbered_docs(folder):
        return [path for _, path in docs]
    inside = [p for p in sorted(folder.iterdir()) if p.name[0] != "." and p.is_file() and _ending(p.name)]
    if not inside:
        raise DataError(f"{folder}: expected .jsonl or .jsonl.gz files of passages, found none")
    return inside


def passages_of_rows(files: Sequence[PathLike], work: Path) -> list[Path]:
    """Every different ``pos`` and ``neg`` of training files as a corpus in ``work``; memory does not grow with them."""
    return _written((Plain("", text) for text in _row_passages(files)), work, files[0])


def _written(passages: Iterable[Plain], work: Path, source: PathLike) -> list[Path]:
    """The passages as a file in ``work``; where there is no docid, it is the passage's place."""
    target, place, seen = work / "docs-0.jsonl", -1, KeySet()
    with clear_disk_errors(f"writing {target}"), atomic_open(target) as stream:
        for place, passage in enumerate(passages):
            docid = passage.docid or str(place)
            if not seen.add(docid.encode()):
                raise DataError(
                    f"{passage.where}: docid {docid!r} was there before; give every passage an id of its own, or none "
                    "to any"
                )
            stream.write(json_line({"docid": docid, "title": passage.title, "text": passage.text}))
        if place < 0:
            raise DataError(f"{source}: no passages in it; name a corpus with --corpus")
    return [target]


def index_label(path: PathLike) -> str:
    """The name of a corpus's index: a folder's whole name (``miracl-corpus-v1.0-ko``), a file's without suffix."""
    name = Path(path).name
    return name[: -len(_ending(name)) or None]


def _ending(name: str) -> str:
    """The ending of a name that says it can hold passages, such as ``.jsonl.gz``; empty: it cannot."""
    packed = packing(name)
    ending = Path(name[: -len(packed) or None]).suffix
    return name[-len(ending + packed) :] if ending.lower() in (".jsonl", ".json") or is_table(name) else ""


def _lies_ready(path: Path) -> bool:
    """Whether a file is lines of passages with docids, by its first line."""
    if is_table(path):
        return False
    try:
        row = parse_json(next(numbered_lines(path, "corpus"), (0, ""))[1])
    except ValueError:  # the reader of rows, which all others go through, says what is wrong
        return False
    return isinstance(row, dict) and any(isinstance(row.get(key), str) for key in _IDS[:2])


def _plain_passages(paths: Sequence[Path]) -> Iterator[Plain]:
    problems = Problems()
    for path in paths:
        for line, row in read_rows(path, problems):
            text, title = row.get("text"), row.get("title")
            docid = next((row[key] for key in _IDS if row.get(key) is not None), None)
            report = partial(problems.report, str(path), line)
            if not isinstance(text, str) or is_blank(text):
                report("text", "is missing or empty", "give every passage its text")
            elif title is not None and not isinstance(title, str):
                report("title", f"is {kind_of(title)}", "give text, or leave it out")
            elif isinstance(docid, bool) or not isinstance(docid, str | int | None) or docid == "":
                report("docid", f"is {kind_of(docid)}", "give one word or a whole number")
            elif any(half_pair(each) for each in (text, title or "", str(docid))):
                report("", "half of a surrogate pair", "write whole characters")
            else:
                yield Plain(title or "", text, None if docid is None else str(docid), f"{path}:{line}")
    problems.raise_if_any()


def _row_passages(paths: Sequence[PathLike]) -> Iterator[str]:
    problems, seen = Problems(), KeySet()
    for path in paths:
        for _, row in read_rows(path, problems):
            for texts in (row.get("pos"), row.get("neg")):
                for text in [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []:
                    if isinstance(text, str) and not is_blank(text) and seen.add(_key(text)):
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
