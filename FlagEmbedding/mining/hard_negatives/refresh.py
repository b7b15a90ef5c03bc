"""Negatives mined again while training goes on (ANCE's asynchronous index, here between epochs).

``refresh_negatives`` takes a checkpoint of the weights as they are and the training files, and writes each file again
with negatives that this model finds hard: the same rows in the same order, each with about as many negatives as the
rows had. Where a row had ``neg_q``, a negative that stays keeps its queries; a new one gets a query that the files know
it answers (as another row's ``neg_q``, or as a positive), and is marked missing where there is none. In ``folder``:

    000-train.jsonl …   the files, in the order given
    refresh.json        written last: what they were made from, their SHA-256, figures

Called by every process of a run: all embed the corpus together, the main one mines. Killed or called again for the
same weights, it goes on or returns what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from FlagEmbedding.collections.corpus import Survey
from FlagEmbedding.indexing.arguments import IndexArguments
from FlagEmbedding.indexing.encoding import build_index
from FlagEmbedding.indexing.retriever import Retriever
from FlagEmbedding.inference.arguments import WINDOW, DtypeName, EncoderArguments, Pooling
from FlagEmbedding.inference.text_encoder import TextEncoder
from FlagEmbedding.mining.common.alignment import realign, written
from FlagEmbedding.mining.common.jobs import Job
from FlagEmbedding.mining.common.negative_table import NegativeTable, negative_table
from FlagEmbedding.mining.common.passages import PassageStore, corpus_files, passages_of_rows
from FlagEmbedding.mining.common.queries import TrainingRows
from FlagEmbedding.mining.hard_negatives.filters import Sampling, ScoreFilters
from FlagEmbedding.mining.hard_negatives.miner import Mined, Miner, training_row
from FlagEmbedding.mining.hard_negatives.pipeline import describe_miner, mine_into
from FlagEmbedding.mining.hard_negatives.report import summarize
from FlagEmbedding.retrieval.index import FlatIndex, remove_index
from FlagEmbedding.schema import read_records
from FlagEmbedding.utils.identity import as_json
from FlagEmbedding.utils.io import read_json, sha256_file, write_json_atomic
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.processes import on_main
from FlagEmbedding.utils.texts import text_keys

logger = get_logger(__name__)

CORPUS, RECORD = "corpus", "refresh.json"


class SourceOptions(Protocol):
    """Of a training run: where negatives come from. ``refresh_corpus`` empty: the passages of the training rows."""

    @property
    def refresh_corpus(self) -> list[str]: ...
    @property
    def refresh_range_for_sampling(self) -> str: ...
    @property
    def refresh_relative_margin(self) -> float | None: ...


class TextOptions(Protocol):
    """Of a training run: how texts become tokens."""

    @property
    def query_max_len(self) -> int: ...
    @property
    def passage_max_len(self) -> int: ...
    @property
    def query_instruction_for_retrieval(self) -> str | None: ...
    @property
    def passage_instruction_for_retrieval(self) -> str | None: ...


class VectorOptions(Protocol):
    """Of a training run: how tokens become a vector."""

    @property
    def sentence_pooling_method(self) -> Pooling | None: ...
    @property
    def normalize_embeddings(self) -> bool | None: ...


@dataclass(frozen=True)
class RefreshSettings:
    """How negatives are mined again: a training run's groups of options, whole.

    Attributes:
        seed: of the choices; each refresh has its own stream.
        dtype: what the model computes in.
    """

    source: SourceOptions
    texts: TextOptions
    vectors: VectorOptions
    seed: int
    dtype: DtypeName


def check_passages(train_files: Sequence[Path], folder: Path, settings: RefreshSettings) -> None:
    """Read the corpus once before training, so that what is wrong with it shows now and not epochs later."""
    _passages(train_files, folder / CORPUS, settings)


def refresh_negatives(
    checkpoint: Path, train_files: Sequence[Path], folder: Path, settings: RefreshSettings
) -> dict[str, Any]:
    """Mine for every row of ``train_files`` with ``checkpoint`` into ``folder``; returns what ``refresh.json`` says.

    The record's ``files`` (names in ``folder``) run parallel to ``train_files``. Raises ``UserError``.
    """
    encoder = TextEncoder(
        EncoderArguments(
            encoder=str(checkpoint),
            pooling_method=settings.vectors.sentence_pooling_method,
            normalize_embeddings=settings.vectors.normalize_embeddings is not False,
            dtype=settings.dtype,
        )
    )
    identity = {
        "model": encoder.describe()["model"],
        "settings": as_json(asdict(settings)),
        "inputs": [sha256_file(path) for path in train_files],
    }
    there = on_main(lambda: read_refresh(folder))
    if there is not None and there["identity"] == identity:
        logger.info("%s: negatives of these weights are there already", folder)
        return there
    on_main(lambda: (folder / RECORD).unlink(missing_ok=True))
    # The passages are the same at every refresh of a run.
    files, survey = on_main(lambda: _passages(train_files, folder.parent / CORPUS, settings))
    config = IndexArguments(
        max_passage_length=settings.texts.passage_max_len,
        passage_instruction_for_retrieval=settings.texts.passage_instruction_for_retrieval,
        overwrite=True,
    )
    build_index(encoder, files, folder / "index", "refresh", config, survey)
    return on_main(lambda: _mine(encoder, files, train_files, folder, settings, identity))


def read_refresh(folder: Path) -> dict[str, Any] | None:
    """The record of a refresh that was finished, its files all there and unchanged; otherwise None."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = read_json(path)
        files = list(zip(record["files"], record["sha256"], strict=True))
        whole = all((folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in files)
        return record if whole and {"identity", "figures"} <= record.keys() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _passages(train_files: Sequence[Path], shared: Path, settings: RefreshSettings) -> tuple[list[Path], Survey]:
    shared.mkdir(parents=True, exist_ok=True)
    corpus = settings.source.refresh_corpus
    files = corpus_files(corpus, shared) if corpus else passages_of_rows(train_files, shared)
    return files, PassageStore.prepare(files, shared, allow_empty=False).survey


def _mine(
    encoder: TextEncoder, files: Sequence[Path], train_files: Sequence[Path], folder: Path, settings: RefreshSettings,
    identity: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Mine file after file and write the record (main process)."""
    store = PassageStore.prepare(files, folder.parent / CORPUS)
    retriever = Retriever(
        encoder,
        FlatIndex(folder / "index"),
        query_length=settings.texts.query_max_len,
        passage_length=settings.texts.passage_max_len,
        query_instruction=settings.texts.query_instruction_for_retrieval,
        passage_instruction=settings.texts.passage_instruction_for_retrieval,
    )
    filters = ScoreFilters(relative_margin=settings.source.refresh_relative_margin)
    notes: list[dict[str, Any]] = []
    names: list[str] = []
    with negative_table(folder / "known.sqlite", settings.seed) as known:
        _learn(known, train_files)
        for number, path in enumerate(train_files):
            rows = TrainingRows([path])
            miner = Miner(store, _sampling(rows, settings, folder), filters, retriever)
            name = f"{number:03d}-{path.name.split('.')[0]}.jsonl"
            with Job(folder / name, {**identity, **describe_miner(miner)}, overwrite=True) as job:
                mine_into(job, rows, miner, WINDOW, lambda mined: _row(mined, known))
                notes += job.notes()
                job.finish()
            names.append(name)
    digests = [sha256_file(folder / name) for name in names]
    record = {"identity": identity, "files": names, "sha256": digests, "figures": _figures(notes)}
    write_json_atomic(folder / RECORD, record)
    remove_index(folder / "index")
    return record


def _sampling(rows: TrainingRows, settings: RefreshSettings, folder: Path) -> Sampling:
    return Sampling(
        range_for_sampling=settings.source.refresh_range_for_sampling,
        negative_number=max(1, round(rows.negatives / len(rows))),
        # The folder's name tells the epoch: chances are drawn again at every refresh.
        seed=settings.seed + int(folder.name.rpartition("-")[2] or 0),
    )


def _learn(known: NegativeTable, train_files: Sequence[Path]) -> None:
    """Which queries every passage of the files answers."""
    for path in train_files:
        for record in read_records(path):
            known.add_real(record.query, record.pos)
            for negative, queries in zip(record.neg, record.neg_q or [], strict=False):
                for query in queries:
                    known.add_real(query, [negative])


def _row(mined: Mined, known: NegativeTable) -> dict[str, Any]:
    """The row with its new negatives, or, where none was found, as it was."""
    record = mined.item.record
    assert record is not None
    row = training_row(mined)
    if row is None:
        row = {"query": record.query, "pos": record.pos, "neg": record.neg, **mined.item.others}
        if record.neg_q is not None:
            row["neg_q"] = written(record.neg_q)
    elif record.neg_q is not None:
        queries = realign(record, row["neg"])
        queries = [own or known.real(text, record.query, 1)[0] for own, text in zip(queries, row["neg"], strict=True)]
        row["neg_q"] = written(queries)
        mined.note["neg_q"][1] = sum(map(bool, queries))
    mined.note["stayed"] = len(text_keys(row["neg"]) & text_keys(record.neg))
    mined.note["negatives"] = len(row["neg"])
    return row


def _figures(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers for the training log."""
    summary, negatives = summarize(notes, 1), sum(note["negatives"] for note in notes)
    scores, neg_q = summary["scores"], summary["neg_q"]
    return {
        "kept": round(sum(note["stayed"] for note in notes) / negatives, 6),
        "positive_score": scores["positive"]["mean"],
        "negative_score": scores["negative"]["mean"] if "negative" in scores else 0.0,
        "neg_q": round(neg_q["kept"] / neg_q["places"], 6) if neg_q["places"] else 0.0,
    }
