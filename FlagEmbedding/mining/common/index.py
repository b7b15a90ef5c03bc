"""An encoder and the index of a corpus: the one that is there, with its settings, or one that is built now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.planning import WORK
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.arguments import EncoderArguments
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.mining.common.options import SearchArguments
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, index_label, passages_of_rows
from FlagEmbedding.retrieval.index import DOCID, INDEX, FlatIndex, index_folder
from FlagEmbedding.retrieval.shards import MANIFEST, read_manifest
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.io import sha256_file
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Files of passages, and the name of their index where none is given."""

    files: list[Path]
    label: str


def named_corpus(paths: Sequence[str], language: str | None, rows: Sequence[Path], work: Path) -> Corpus:
    """The corpus that ``paths`` name; without any, the passages of the training files ``rows``."""
    if paths:
        return Corpus(corpus_files(paths, work), language or index_label(paths[0]))
    return Corpus(passages_of_rows(rows, work), f"{index_label(rows[0])}-passages")


def settle(search: SearchArguments, folder: Path) -> SearchArguments:
    """``search`` with length, instruction and title rule as the index ``folder`` says, else with the defaults.

    Raises:
        UsageError: a flag says otherwise than the index.
    """
    manifest = read_manifest(folder / MANIFEST) or read_manifest(folder / WORK / MANIFEST)
    there = manifest["identity"] if manifest else {}
    settled: dict[str, Any] = {}
    for flag, key, default in (
        ("passage_max_length", "max_passage_length", 512),
        ("passage_instruction_for_retrieval", "passage_instruction", None),
        ("with_title", "with_title", False),
    ):
        given = getattr(search, flag)
        if given is not None and key in there and there[key] != given:
            raise UsageError(
                f"--{flag} {given}: the index {folder} was made with {there[key]}; leave the flag out, or name "
                "another --index_dir"
            )
        settled[flag] = there.get(key, default if given is None else given)
    return replace(search, **settled)


def open_retriever(
    options: EncoderArguments, search: SearchArguments, corpus: Corpus, work: Path
) -> tuple[Retriever, PassageStore]:
    """The encoder with the index of ``corpus``, as it stands or built now (and continued), and the texts.

    Raises:
        UsageError: the index is another encoder's or another corpus's, or a flag contradicts it.
    """
    folder = Path(search.index_dir or index_folder(search.index_save_dir, options.encoder, corpus.label))
    search = settle(search, folder)
    length = search.passage_max_length
    assert length is not None
    with_title, instruction = bool(search.with_title), search.passage_instruction_for_retrieval
    store = PassageStore.prepare(corpus.files, work, with_title)
    encoder = TextEncoder(options)
    if instruction is None and not (folder / MANIFEST).is_file():
        instruction = encoder.instruction("passage", None)
    if (folder / INDEX).is_file() and (folder / DOCID).is_file() and not (folder / WORK).is_dir():
        logger.info("%s: using the index that is there", folder)
    else:
        config = IndexArguments(length, with_title, instruction)
        build_index(encoder, corpus.files, folder, corpus.label, config, store.survey)
    index = FlatIndex(folder)
    check_index(index, encoder, store)
    retriever = Retriever(
        encoder, index, query_length=search.query_max_length, passage_length=length,
        query_instruction=encoder.instruction("query", search.query_instruction_for_retrieval),
        passage_instruction=instruction,
        threads=search.threads,
    )  # fmt: skip
    return retriever, store


def check_index(index: FlatIndex, encoder: TextEncoder, store: PassageStore) -> None:
    """Refuse an index of another encoder or of other passages."""
    made_from = ((index.manifest or {}).get("identity") or {}).get("corpus")
    same = made_from is None or [f["sha256"] for f in made_from] == [f["sha256"] for f in store.corpus]
    if not same or sha256_file(index.folder / DOCID) != store.docid_digest():
        raise UsageError(
            f"{index.folder} holds {index.rows} passages, and not those of this corpus ({store.rows}): give the corpus "
            "that it was made from, or another --index_dir"
        )
    index.check_encoder(encoder.describe(), "give the encoder and flags it was made with, or another --index_dir")
